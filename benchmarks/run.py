"""The suite from beginning to end."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import workloads
from .contenders.registry import is_ours
from .measure import accuracy, loops, steps
from .measure import guidance as methods
from .measure.timing import said
from .report import pages as report
from .report import results, targets

SUITES = ("steps", "loops", "accuracy", "growth", "methods")


def run(
    device: torch.device,
    *,
    full: bool,
    suites: Sequence[str],
    names: Sequence[str],
    before: dict[str, Any] | None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Measure, judge, and compare with an earlier result; returns all of it, also of a run that is interrupted."""
    begin = time.perf_counter()
    machine = results.machine(device)
    busy = results.busy()
    machine["busy before"] = "unknown" if busy is None else f"{busy:.0%}"
    say(f"on {device.type}: {machine['backend']}")
    rows: list[dict[str, Any]] = []
    interrupted = False
    try:
        for what, found in _parts(device, full, suites, names):
            say(f"[{time.perf_counter() - begin:5.1f} s] {what}")
            try:
                for row in found:
                    rows.append(row)
            except Exception as error:  # reported, as what was measured before it is worth having
                failed = {"suite": "the suite", "workload": what, "contender": "fastguide", "status": "failed"}
                rows.append(failed | {"reason": said(error)})
    except KeyboardInterrupt:
        say("interrupted: what follows is what was measured")
        interrupted = True
        reason = "the tables and targets are of what was measured until then"
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
    return {"machine": machine, "seconds": seconds, "interrupted": interrupted, "rows": rows}


def _parts(
    device: torch.device, full: bool, suites: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
    """What to measure, with its title."""
    each = 4.0 if full else 1.2
    if "steps" in suites:
        for workload in chosen_steps(names, full, device.type == "cuda"):
            yield workload.title, steps.measure(workload, device, each)
    if "loops" in suites:
        yield "what the loop itself costs", loops.host_cost(device)
        for kind, count in chosen_loops(names, device.type == "cuda"):
            yield f"loop: {kind}, {count} steps", loops.measure(kind, count, device, each)
    if "accuracy" in suites:
        yield "accuracy of 50 steps", accuracy.measure(device)
    if "growth" in suites:
        yield "cost by growth", steps.growth(device, each)
    if "methods" in suites:
        yield "both guidance methods: cost", methods.costs(device)
        yield "both guidance methods: quality", methods.quality(device)


def check_names(names: Sequence[str], suites: Sequence[str], full: bool, gpu: bool) -> None:
    """Refuse a name that no workload of these suites has.

    Raises:
        ValueError: naming those that there are.
    """
    known = [workload.title for workload in chosen_steps([], full, gpu)] if "steps" in suites else []
    known += [f"{kind}, {count} steps" for kind, count in chosen_loops([], gpu)] if "loops" in suites else []
    if names and not known:
        raise ValueError(f"--workload: expected none, as {' and '.join(suites)} has none of these, got {names[0]!r}")
    for name in names:
        if not any(title.startswith(name) for title in known):
            listed = "\n  ".join(known)
            raise ValueError(f"--workload: expected the beginning of one of\n  {listed}\ngot {name!r}")


def chosen_steps(names: Sequence[str], full: bool, gpu: bool) -> list[workloads.Workload]:
    """The steps whose titles begin with a name; all, if none are named; a GPU's bandwidth takes large ones."""
    known = workloads.full() if full else workloads.quick() + (workloads.large() if gpu else [])
    return [w for w in known if not names or any(w.title.startswith(name) for name in names)]


def chosen_loops(names: Sequence[str], gpu: bool) -> list[tuple[str, int]]:
    """The loops whose titles begin with a name; all, if none are named; the large model would take a CPU an hour."""
    kinds = [kind for kind in loops.MODELS if gpu or not kind.startswith("large")]
    found = [(kind, n) for kind in kinds for n in (20, 50)]
    return [(kind, n) for kind, n in found if not names or any(f"{kind}, {n} steps".startswith(x) for x in names)]


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
    """The command.

    Returns:
        1 if something of fastguide's was wrong or failed, or a comparison became worse; missed targets are shown, and
        are no failure. 130 if it was interrupted.

    Raises:
        ValueError, OSError: an option is not as it has to be; nothing has been measured then.
    """
    place = _device(device)
    suites = suites or SUITES
    check_names(names, suites, full, place.type == "cuda")
    before = None
    if compare is not None:
        before = results.load(compare)
        for difference in results.check_comparable(before, compare, place, suites):
            print(f"fastguide: --compare: {difference}", file=sys.stderr)
    for option, folder in (("--output", output), ("--json", None if json is None else json.parent)):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".fastguide").touch()
                (folder / ".fastguide").unlink()
            except OSError as error:
                raise ValueError(f"{option}: expected a folder that can be written, got {error}") from None
    found = run(place, full=full, suites=suites, names=names, before=before)
    results.save(found, output / "results.json")
    if json is not None:
        results.save(found, json)
    print(report.terminal(found["rows"], sys.stdout.isatty()))
    written = report.write(found, output)
    print(f"\nreport: {written[0]}; numbers: {output / 'results.json'}; {found['seconds']:.0f} s")
    if found["interrupted"]:
        return 130
    broken = [r for r in found["rows"] if r["status"] in ("wrong", "failed") and is_ours(r.get("contender", ""))]
    comparisons = [r for r in found["rows"] if r["suite"] == "compared"]
    if compare is not None and not comparisons:
        print(f"fastguide: --compare: {compare} has nothing that was measured now", file=sys.stderr)
        return 1
    return 1 if broken or any(r["status"] == "worse" for r in comparisons) else 0


def _device(name: str) -> torch.device:
    """A device that can be measured."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: expected one that torch sees, got {name!r}: {str(error).splitlines()[0]}"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
