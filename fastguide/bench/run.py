"""The suite from beginning to end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import accuracy, loops, methods, report, results, steps, targets, workloads

SUITES = ("steps", "loops", "accuracy", "growth", "methods")


def chosen(names: Sequence[str], full: bool) -> list[workloads.Workload]:
    """The workloads whose names begin so; all, if none are named.

    Raises:
        ValueError: a name that no workload has.
    """
    known = workloads.full() if full else workloads.quick()
    if not names:
        return known
    found = []
    for name in names:
        matching = [workload for workload in known if workload.title.startswith(name)]
        if not matching:
            titles = "\n  ".join(workload.title for workload in known)
            raise ValueError(f"--workload: expected the beginning of one of\n  {titles}\ngot {name!r}")
        found += matching
    return list(dict.fromkeys(found))


def run(
    device: torch.device,
    *,
    full: bool,
    suites: Sequence[str],
    names: Sequence[str],
    before: dict[str, Any] | None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Measure, judge, and compare with an earlier result; returns all of it."""
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []

    def keep(what: str, found: Iterable[dict[str, Any]]) -> None:
        say(f"[{time.perf_counter() - begin:5.1f} s] {what}")
        rows.extend(found)

    each = 4.0 if full else 1.2
    if "steps" in suites:
        for workload in chosen(names, full):
            keep(workload.title, steps.measure(workload, device, each, slow=full))
    if "loops" in suites:
        keep("what the loop itself costs", loops.host_cost(device))
        large = full or device.type == "cuda"
        for kind in loops.MODELS:
            if kind == "large UNet" and not large:
                continue
            for count in (20, 50) if large or kind == "policy" else (2, 4):
                title = f"{kind}, {count} steps"
                if not names or any(title.startswith(name) for name in names):
                    keep(f"loop: {title}", loops.measure(kind, count, device, each))
    if "accuracy" in suites:
        keep("accuracy of 50 steps", accuracy.measure(device))
    if "growth" in suites:
        keep("cost by growth", steps.growth(device, each))
    if "methods" in suites:
        keep("both guidance methods: cost", methods.costs(device))
        keep("both guidance methods: quality", methods.quality(device))
    if before is not None:
        rows.extend(results.compared(rows, before["rows"]))
    rows.extend(targets.judged(rows, device.type))
    return {"machine": results.machine(device), "seconds": time.perf_counter() - begin, "rows": rows}


def main(
    device: str,
    *,
    full: bool,
    suites: Sequence[str],
    names: Sequence[str],
    json: Path | None,
    compare: Path | None,
    output: Path,
) -> int:
    """The command; the exit status is 1 if a contender of fastguide was wrong or a comparison became worse."""
    before = None if compare is None else results.load(compare)
    found = run(torch.device(device), full=full, suites=suites or SUITES, names=names, before=before)
    print(report.terminal(found["rows"], sys.stdout.isatty()))
    written = report.write(found, output)
    results.save(found, output / "results.json")
    if json is not None:
        results.save(found, json)
    print(f"\nreport: {written[0]}; numbers: {output / 'results.json'}; {found['seconds']:.0f} s")
    wrong = [r for r in found["rows"] if r["status"] == "wrong" and r["contender"].startswith(("fastguide", "Sampler"))]
    worse = [r for r in found["rows"] if r["suite"] == "compared" and r["status"] == "worse"]
    return 1 if wrong or worse else 0
