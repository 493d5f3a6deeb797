"""The command ``python -m benchmarks``: measure, print the tables, and write the numbers and the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import suites
from .contenders.registry import is_ours
from .report import pages, results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process.

    Returns:
        The exit status: 1 if something of fastguide's is wrong, failed, or worse than in the compared run; a missed
        target is shown and is no failure. 2 for an option that cannot be used; nothing is measured then. 130 after an
        interruption.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time fastguide beside others on this machine, and write a report: six minutes on a CPU.",
    )
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--full", action="store_true", help="every shape, dtype, solver and guidance")
    parser.add_argument("--device", default=cuda, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SUITE", default=[], help=f"some of {', '.join(suites.SUITES)}")
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        default=[],
        help="only steps, solvers, loops, ranks, pipelines whose titles begin so",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="compare the ratios with an earlier run's")
    parser.add_argument(
        "--output", type=Path, default=Path("fastguide-bench"), metavar="DIR", help="default: %(default)s"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    unknown = [suite for suite in options.only if suite not in suites.SUITES]
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(suites.SUITES)}, got {unknown[0]!r}")
    device, chosen = _device(options.device), options.only or suites.SUITES
    suites.check_names(options.workload, chosen, options.full, device.type == "cuda")
    before = None
    if options.compare is not None:
        before = results.load(options.compare)
        for difference in results.check_comparable(before, options.compare, device, chosen):
            print(f"benchmarks: --compare: {difference}", file=sys.stderr)
    _check_folder("--output", options.output)
    if options.json is not None:
        _check_folder("--json", options.json.parent)
    found = suites.run(device, full=options.full, suites=chosen, names=options.workload, before=before)
    results.save(found, options.output / "results.json")
    if options.json is not None:
        results.save(found, options.json)
    print(pages.terminal(found["rows"], sys.stdout.isatty()))
    page, *_ = pages.write(found, options.output)
    print(f"\nreport: {page}; numbers: {options.output / 'results.json'}; {found['seconds']:.0f} s")
    return _status(found, options.compare)


def _status(found: dict[str, Any], compare: Path | None) -> int:
    if found["interrupted"]:
        return 130
    comparisons = [r for r in found["rows"] if r["suite"] == "compared"]
    if compare is not None and not comparisons:
        print(f"benchmarks: --compare: {compare} has nothing that was measured now", file=sys.stderr)
        return 1
    broken = any(r["status"] in ("wrong", "failed") and is_ours(r.get("contender", "")) for r in found["rows"])
    return 1 if broken or any(r["status"] == "worse" for r in comparisons) else 0


def _check_folder(option: str, folder: Path) -> None:
    """Make a folder, and refuse it before anything is measured if no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".fastguide"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{option}: expected a folder that can be written, got {error}") from None


def _device(name: str) -> torch.device:
    """Return a device that can be measured."""
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


if __name__ == "__main__":
    sys.exit(main())
