"""Measure each suite in the order of a run, then judge all rows and compare them with an earlier run's."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from . import workloads
from .measure import accuracy, guidance, loops, moments, pipelines, ranks, solvers, steps
from .measure.timing import describe
from .report import machine, results, targets

SUITES = ("steps", "solvers", "moments", "loops", "ranks", "pipelines", "accuracy", "growth", "guidance")

Row = dict[str, Any]


def run(
    device: torch.device,
    *,
    full: bool,
    suites: Sequence[str],
    names: Sequence[str],
    before: dict[str, Any] | None,
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Measure the suites, judge the rows by the targets, and compare them with an earlier result.

    Args:
        device: where to measure.
        full: take every workload, and more time for each.
        suites: which of ``SUITES``.
        names: the beginnings of the titles of what to measure: steps, solvers, moments, loops, ranks, pipelines; all if
            there are none.
        before: the earlier result to compare with.
        log: takes a line at the beginning of each part.

    Returns:
        Everything that was measured: the machine, the seconds, whether it was interrupted, and the rows. After an
        interruption, what was measured until then.
    """
    begin = time.perf_counter()
    about = machine.machine(device)
    busy = machine.busy()
    about["busy before"] = "unknown" if busy is None else f"{busy:.0%}"
    log(f"on {device.type}: {about['backend']}")
    rows: list[Row] = []
    interrupted = False
    try:
        for title, part in _parts(device, full, suites, names):
            log(f"[{time.perf_counter() - begin:5.1f} s] {title}")
            try:
                for row in part:
                    rows.append(row)
            except Exception as error:  # reported as a row: the rows measured before it are worth keeping
                failed = {"suite": "the suite", "workload": title, "contender": "fastguide", "status": "failed"}
                rows.append(failed | {"reason": describe(error)})
    except KeyboardInterrupt:
        log("interrupted: the report shows what was measured until now")
        interrupted = True
        reason = "tables and targets show what was measured before the interruption"
        rows.append({"suite": "the suite", "workload": "the run", "status": "interrupted", "reason": reason})
    if importlib.util.find_spec("matplotlib") is None:
        reason = "matplotlib is not installed"
        rows.append({"suite": "the suite", "workload": "plots", "status": "not run", "reason": reason})
    if before is not None:
        rows.extend(results.compared(rows, before["rows"]))
    rows.extend(results.disturbed(rows, busy))
    rows.extend(targets.judged(rows, device.type))
    rows = results.doubted(rows, [] if before is None else before["rows"])
    seconds = time.perf_counter() - begin
    return {"machine": about, "seconds": seconds, "interrupted": interrupted, "rows": rows}


def _parts(
    device: torch.device, full: bool, suites: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[str, Iterable[Row]]]:
    """Yield the title and the rows of each part of the suites."""
    seconds = 4.0 if full else 1.2
    if "steps" in suites:
        for workload in chosen_steps(names, full, device.type == "cuda"):
            yield workload.title, steps.measure(workload, device, seconds)
    if "solvers" in suites:
        for title in chosen_solvers(names):
            yield title, solvers.measure(title, device, seconds)
    if "moments" in suites:
        for title in chosen_moments(names):
            yield title, moments.measure(title, device, seconds)
    if "loops" in suites:
        yield "cost of the loop itself", loops.host_cost(device)
        for kind, count in chosen_loops(names, device.type == "cuda"):
            yield f"loop: {kind}, {count} steps", loops.measure(kind, count, device, seconds)
    if "ranks" in suites and device.type == "cpu":
        for title in chosen_ranks(names):
            yield title, ranks.measure(title, seconds)
    if "pipelines" in suites:
        for each in chosen_pipelines(names):
            yield pipelines.title(*each), pipelines.measure(*each, device, seconds)
    if "accuracy" in suites:
        yield "accuracy of 50 steps", accuracy.measure(device)
    if "growth" in suites:
        yield "cost by growth", steps.growth(device, seconds)
    if "guidance" in suites:
        yield "both kinds of guidance: cost", guidance.costs(device)
        yield "both kinds of guidance: quality", guidance.quality(device)


def check_names(names: Sequence[str], suites: Sequence[str], full: bool, gpu: bool) -> None:
    """Refuse a name that begins no workload of these suites.

    Raises:
        ValueError: with the workloads that there are.
    """
    titles = [workload.title for workload in chosen_steps([], full, gpu)] if "steps" in suites else []
    titles += chosen_solvers([]) if "solvers" in suites else []
    titles += chosen_moments([]) if "moments" in suites else []
    titles += [f"{kind}, {count} steps" for kind, count in chosen_loops([], gpu)] if "loops" in suites else []
    titles += chosen_ranks([]) if "ranks" in suites and not gpu else []
    titles += [pipelines.title(*each) for each in chosen_pipelines([])] if "pipelines" in suites else []
    if names and not titles:
        raise ValueError(f"--workload: expected none, as {' and '.join(suites)} has no workloads, got {names[0]!r}")
    for name in names:
        if not any(title.startswith(name) for title in titles):
            lines = "\n  ".join(titles)
            raise ValueError(f"--workload: expected the beginning of one of\n  {lines}\ngot {name!r}")


def chosen_steps(names: Sequence[str], full: bool, gpu: bool) -> list[workloads.Workload]:
    """Return the steps whose titles begin with one of the names, or all; a GPU's bandwidth takes large ones too."""
    every = workloads.full() if full else workloads.quick() + (workloads.large() if gpu else [])
    return [w for w in every if not names or any(w.title.startswith(name) for name in names)]


def chosen_solvers(names: Sequence[str]) -> list[str]:
    """Return the solvers' workloads whose titles begin with one of the names, or all."""
    return [title for title in solvers.titles() if not names or any(title.startswith(name) for name in names)]


def chosen_moments(names: Sequence[str]) -> list[str]:
    """Return the steps with weights from moments whose titles begin with one of the names, or all."""
    return [title for title in moments.titles() if not names or any(title.startswith(name) for name in names)]


def chosen_loops(names: Sequence[str], gpu: bool) -> list[tuple[str, int]]:
    """Return the loops whose titles begin with one of the names, or all; a CPU leaves out the large model."""
    kinds = [kind for kind in loops.MODELS if gpu or not kind.startswith("large")]
    every = [(kind, n) for kind in kinds for n in (20, 50)]
    return [(kind, n) for kind, n in every if not names or any(f"{kind}, {n} steps".startswith(x) for x in names)]


def chosen_ranks(names: Sequence[str]) -> list[str]:
    """Return the loops of several processes whose titles begin with one of the names, or all."""
    return [title for title in ranks.titles() if not names or any(title.startswith(name) for name in names)]


def chosen_pipelines(names: Sequence[str]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the pipelines' schedulers, guidances and shapes whose titles begin with one of the names, or all."""
    every = pipelines.workloads()
    return [each for each in every if not names or any(pipelines.title(*each).startswith(name) for name in names)]
