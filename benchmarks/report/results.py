"""Results as a file, and two of them compared by the ratios within each run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastguide import __version__
from fastguide.step.backends.registry import BACKENDS, default_backend

from ..contenders.registry import is_ours

FORMAT = 3  # a step finds its caches overwritten
_BASELINES = ("diffusers", "torch eager")
COMPARED = ("steps", "loops", "accuracy")
_IDLE = 0.15  # the share of the processors that a waiting system may use
_STEADY = 2.5  # the slowest tenth of copy_ over its fastest: up to 2.4 was seen where nobody else ran
_SAME, _WAITING = 1.3, 1e7  # one copy_ over another of as many bytes, if they are so many that it waits for the memory
_WORSE = 1.25  # a ratio that grew by more is called a regression: shared machines are noisy


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "huge pages": huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastguide": __version__,
        "backend": f"{default_backend(device)}: {BACKENDS[default_backend(device)].status}",
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "driver": driver(), "cuda": torch.version.cuda}
    for package in ("diffusers", "triton", "matplotlib", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def huge_pages() -> str:
    """What the system says of transparent huge pages, on which the time of large new tensors depends."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else "unknown"
    return f"{found}; torch asks for them itself" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else found


def busy(seconds: float = 0.5) -> float | None:
    """The share of this process's processors that others use meanwhile; None where the system does not say."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[0] == before[0]:
        return None
    return 1 - (after[1] - before[1]) / (after[0] - before[0])


def _ticks() -> tuple[int, int] | None:
    """Of this process's processors since the start: all, and idle ones."""
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return None
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in stat.read_text().splitlines()]
    found = [[int(value) for value in line[1:9]] for line in lines if line[0] in ours]  # the rest is in these
    return sum(map(sum, found)), sum(line[3] + line[4] for line in found)


def driver() -> str:
    """The GPU driver's version, where nvidia-smi tells."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "nvidia-smi is not there"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.strip().partition("\n")[0] or f"nvidia-smi: {found.stderr.strip()}"


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
    text = json.dumps(_finite({"format": FORMAT, **results}), indent=1, allow_nan=False)
    path.write_text(text + "\n")


def _finite(value: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises:
        ValueError: it is no such file, or one of another version of the format.
    """
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare: {path}: expected a result of fastguide bench, got {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "rows" not in found:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        advice = "run it again with this version"
        raise ValueError(
            f"--compare: {path}: expected a result of fastguide bench of format {FORMAT}, got format {got}; {advice}"
        )
    rows = found["rows"]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"suite", "status"} <= row.keys() for row in rows
    ):
        raise ValueError(f"--compare: {path}: expected rows with a suite and a status")
    return dict(found)


def compared(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of fastguide's rows of the earlier run: its time or error over the same baseline's, then and now.

    A row that was measured then and is wrong or failed now is worse; one that was not asked for now is left out.
    """
    now, then = _values(rows), _values(before)
    asked = {workload_of(row) for row in rows if row["suite"] in COMPARED}
    wrong = [r for r in rows if r["suite"] in COMPARED and r["status"] in ("wrong", "failed")]
    broken = {(workload_of(r), r["contender"]): r["reason"] for r in wrong}
    found = []
    for (workload, contender), value in then.items():
        if not is_ours(contender) or workload not in asked or not any((workload, b) in then for b in _BASELINES):
            continue
        row = {"suite": "compared", "workload": workload, "contender": contender}
        if (workload, contender) not in now:
            reason = broken.get((workload, contender), "not measured now")
            found.append(row | {"status": "worse", "reason": reason})
            continue
        shared = [b for b in _BASELINES if (workload, b) in now and (workload, b) in then]
        if not shared:
            found.append(row | {"status": "not compared", "reason": f"no common baseline of {', '.join(_BASELINES)}"})
            continue
        ratios = [value / then[workload, shared[0]], now[workload, contender] / now[workload, shared[0]]]
        status = "worse" if ratios[1] > _WORSE * ratios[0] else "better" if ratios[0] > _WORSE * ratios[1] else "alike"
        found.append(row | {"baseline": shared[0], "then": ratios[0], "now": ratios[1], "status": status})
    return found


def workload_of(row: dict[str, Any]) -> str:
    """What two runs have in common."""
    if row["suite"] == "accuracy":
        return f"error of 50 {row['solver']} steps, {row['dtype']}"
    return str(row.get("workload"))


def disturbed(rows: Sequence[dict[str, Any]], busy_before: float | None) -> list[dict[str, Any]]:
    """Rows that say so, if others were at work before, or the same copy took now this long, now that."""
    found = []

    def add(workload: str, reason: str, busy: bool) -> None:
        row = {"suite": "the suite", "workload": workload, "status": "disturbed", "reason": reason, "busy": busy}
        found.append(row)

    if busy_before is not None and busy_before > _IDLE:
        add("before", f"others used {busy_before:.0%} of the processors: measure again when the machine is idle", True)
    copies = [row for row in rows if row.get("contender") == "copy_ of the same bytes" and "p10" in row]
    for row in copies:
        if row["p90"] > _STEADY * row["p10"]:
            low, high = (1e6 * row[which] for which in ("p10", "p90"))
            add(row["workload"], f"copy_ took {low:.0f} to {high:.0f} us: the machine was busy, measure again", True)
    for size in dict.fromkeys(row["bytes"] for row in copies if row["bytes"] > _WAITING):
        alike = sorted((row for row in copies if row["bytes"] == size), key=lambda row: float(row["seconds"]))
        low, high = (1e6 * row["seconds"] for row in (alike[0], alike[-1]))
        if high > _SAME * low:
            here, elsewhere = f"copy_ took {high:.0f} us here", f"of as many bytes elsewhere {low:.0f}"
            reason = f"{here}, {elsewhere}: compare within a table alone"
            add(alike[-1]["workload"], reason, False)
    return found


def doubted(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Targets and comparisons as they are, or, where the machine was busy now or then, without what that may have done.

    What was met is not claimed then, and nothing is called better or worse by its time; what was missed stays missed,
    and what is wrong or failed stays worse.
    """
    now, then = (any(row.get("busy") for row in run) for run in (rows, before))
    found = []
    for row in rows:
        met = row["suite"] == "targets" and row["status"] == "met"
        differs = row["suite"] == "compared" and row["status"] in ("better", "worse") and "now" in row
        if (met and now) or (differs and (now or then)):
            row = row | {"status": "unsure", "reason": "the machine was busy"}
        found.append(row)
    return found


def check_comparable(before: dict[str, Any], path: Path, device: torch.device, suites: Sequence[str]) -> list[str]:
    """Refuse a run of another kind of device or of other suites; returns, in words, what else was not as it is now."""
    if not any(row["suite"] in COMPARED and row["suite"] in suites for row in before["rows"]):
        raise ValueError(
            f"--compare: expected some of {', '.join(COMPARED)} in this run and in {path}, got {', '.join(suites)}"
        )
    was = before.get("machine", {}).get("device")
    if was != device.type:
        raise ValueError(f"--compare: expected a run on {device.type}, as this one, got {path} of {was}")
    now = machine(device)
    return [
        f"{what} was {before['machine'].get(what)!r}, and is {now[what]!r}: ratios may differ by that"
        for what in ("processor", "gpu", "threads", "torch", "diffusers")
        if before["machine"].get(what) != now.get(what)
    ]


def _values(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {
        (workload_of(row), row["contender"]): row["error" if row["suite"] == "accuracy" else "seconds"]
        for row in rows
        if row["status"] == "ok" and row["suite"] in COMPARED
    }
