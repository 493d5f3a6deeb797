"""Results as a file, and two of them compared by the ratios within each run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..ops import BACKENDS, default_backend

FORMAT = 1
_BASELINES = ("diffusers", "torch eager")
_WORSE = 1.25  # a ratio that grew by more is called a regression: shared machines are noisy


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastguide": __version__,
        "backend": f"{default_backend(device)}: {BACKENDS[default_backend(device)].status}",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    for package in ("diffusers", "triton", "matplotlib", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for text in cpuinfo.read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(results: dict[str, Any], path: Path) -> None:
    """Write them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, **results}, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises:
        ValueError: it is no such file, or one of another version of the format.
    """
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a result of fastguide bench, got {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "rows" not in found:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: expected a result of fastguide bench of format {FORMAT}, got format {got}")
    return dict(found)


def compared(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of fastguide's rows in both: its time over the same run's baseline, then and now."""
    ratios_now, ratios_then = _ratios(rows), _ratios(before)
    found = []
    for key, now in ratios_now.items():
        then = ratios_then.get(key)
        if then is None:
            continue
        status = "worse" if now > _WORSE * then else "better" if then > _WORSE * now else "alike"
        workload, contender, baseline = key
        found.append(
            {
                "suite": "compared",
                "workload": workload,
                "contender": contender,
                "baseline": baseline,
                "then": then,
                "now": now,
                "status": status,
            }
        )
    return found


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    seconds = {
        (row["workload"], row["contender"]): row["seconds"]
        for row in rows
        if row.get("status") == "ok" and row["suite"] in ("steps", "loops")
    }
    found = {}
    for (workload, contender), value in seconds.items():
        if not contender.startswith(("fastguide", "Sampler")):
            continue
        for baseline in _BASELINES:
            if (workload, baseline) in seconds:
                found[workload, contender, baseline] = value / seconds[workload, baseline]
                break
    return found
