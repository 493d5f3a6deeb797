"""Save a run's rows, compare two runs by the ratios within each, and mark what a busy machine may have caused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..contenders.registry import is_ours
from .machine import machine

Row = dict[str, Any]

FORMAT = 3  # since steps are timed from cold caches
COMPARED = ("steps", "solvers", "moments", "loops", "pipelines", "accuracy")
_BASELINES = ("diffusers", "torch eager")
_IDLE = 0.15  # the share of the processors that other processes use on an idle system
_STEADY = 2.5  # slowest over fastest tenth of copy_: up to 2.4 was seen on an idle machine
_SAME, _LARGE = 1.3, 1e7  # ratio of two copies of as many bytes, if these are so many that they wait for the memory
_WORSE = 1.25  # a ratio that grows by more is a regression: shared machines are noisy


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite({"format": FORMAT, **results}), indent=1, allow_nan=False)
    path.write_text(text + "\n")


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises:
        ValueError: the file cannot be read, is no result, or has another version of the format.
    """
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare: {path}: expected a result of python -m benchmarks, got {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "rows" not in found:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"--compare: {path}: expected a result of python -m benchmarks of format {FORMAT}, got format {got}; "
            "run the benchmarks again with this version"
        )
    rows = found["rows"]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"suite", "status"} <= row.keys() for row in rows
    ):
        raise ValueError(f"--compare: {path}: expected rows with a suite and a status")
    return dict(found)


def check_comparable(before: dict[str, Any], path: Path, device: torch.device, suites: Sequence[str]) -> list[str]:
    """Refuse a run of another kind of device or of other suites; returns a sentence for each other difference."""
    if not any(row["suite"] in COMPARED and row["suite"] in suites for row in before["rows"]):
        raise ValueError(
            f"--compare: expected some of {', '.join(COMPARED)} in this run and in {path}, got {', '.join(suites)}"
        )
    was = before.get("machine", {}).get("device")
    if was != device.type:
        raise ValueError(f"--compare: expected a run on {device.type}, as this one, got {path} of {was}")
    now = machine(device)
    return [
        f"{what} was {before['machine'].get(what)!r}, and is {now[what]!r}: ratios may differ for that reason"
        for what in ("processor", "gpu", "threads", "torch", "diffusers")
        if before["machine"].get(what) != now.get(what)
    ]


def compared(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """Compare each of fastguide's times and errors, over the baseline of its own run, with the earlier run's.

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


def workload_of(row: Row) -> str:
    """Return the name under which two runs have the same measurement."""
    if row["suite"] == "accuracy":
        return f"error of 50 {row['solver']} steps, {row['dtype']}"
    return str(row.get("workload"))


def _values(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    return {
        (workload_of(row), row["contender"]): row["error" if row["suite"] == "accuracy" else "seconds"]
        for row in rows
        if row["status"] == "ok" and row["suite"] in COMPARED
    }


def disturbed(rows: Sequence[Row], busy_before: float | None) -> list[Row]:
    """Return a row for each sign that others used the machine: before the run, within a copy, or between two copies.

    Args:
        rows: those of the run.
        busy_before: the share of the processors that others used before the run; ``None``: not known.
    """
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
    for size in dict.fromkeys(row["bytes"] for row in copies if row["bytes"] > _LARGE):
        same_size = sorted((row for row in copies if row["bytes"] == size), key=lambda row: float(row["seconds"]))
        low, high = (1e6 * row["seconds"] for row in (same_size[0], same_size[-1]))
        if high > _SAME * low:
            reason = (
                f"copy_ took {high:.0f} us, and {low:.0f} us for as many bytes in another workload: "
                "compare times within one table only"
            )
            add(same_size[-1]["workload"], reason, False)
    return found


def doubted(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """Call unsure what a busy machine, now or in the earlier run, may have caused.

    No target is then met, and no time better or worse. A missed target stays missed, and what is wrong or failed stays
    worse.
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
