"""Print what the GPU kernels' hot launches execute, and an ESTIMATE of their times; no GPU is needed.

    python -m benchmarks.machine_code

A thread of each launch is followed through the machine code of the built library for sm_90 (H100, H200). Needs a C++
compiler, pybind11, and cuobjdump, which the Triton wheel or the CUDA toolkit brings.
"""

from __future__ import annotations

import argparse
import json
import sys

from fastguide.step.backends import native
from tests.support import device_code
from tests.support.machine_code import tool

from .estimate import CLOCK, GPUS, ISSUES, MULTIPROCESSORS
from .figures import ARCHITECTURE, COMMITTED, Figures, measure, record, write
from .launches import LARGE
from .sass import compiler

LATENCY = 5.0
"""Microseconds below which a roofline says nothing: a launch alone takes about as long."""


def main() -> int:
    """Print the table, or write the figures that a test compares with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--write", action="store_true", help=f"renew {COMMITTED.name}, with which a test compares")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"not counted: {reason}", file=sys.stderr)
        return 1
    found = measure(native.LIBRARY)
    if options.write:
        write(native.LIBRARY, found)
    if options.json:
        content = record(native.LIBRARY, found)
        for label, figures in found.items():
            estimates = {
                name: {"memory": round(e.memory, 1), "issue": round(e.issue, 1)}
                for name, e in figures.estimates.items()
            }
            content["launches"][label] = {**figures._asdict(), "estimates": estimates}
        print(json.dumps(content, indent=2))
    else:
        print(table(found))
    return 0


def why_not() -> str | None:
    """Name what is missing."""
    if not native.LIBRARY.exists():
        return "the native library is not built; fastguide info says why"
    if ARCHITECTURE not in native.cuda_code():
        return f"the native library has no code for {ARCHITECTURE}: {native.cuda_code()}"
    if tool() is None:
        return "there is no cuobjdump: neither Triton nor a CUDA toolkit that has it is installed"
    return device_code.why_not()


def table(found: dict[str, Figures]) -> str:
    """Return the figures as a table of Markdown, with what is assumed."""
    gpus = [gpu.name for gpu in GPUS]
    head = ["launch", "registers", "blocks", "in flight", "instructions", *(f"{name}, estimated" for name in gpus)]
    rows = [head, ["---"] * len(head)]
    for label, f in found.items():
        row = [label, f"{f.registers}", f"{f.blocks}", f"{f.in_flight / 1024:.0f} kB", f"{f.per_8_elements:.0f}"]
        for name in gpus:
            e = f.estimates[name]
            bound = f"{e.time:.0f} µs ({e.bound}, {e.issue_share:.0%})"
            row.append(bound if e.time > LATENCY else "latency")
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_notes(found)])


def _notes(found: dict[str, Figures]) -> list[str]:
    copies = " and ".join(f"{gpu.copy / 1e12} of {gpu.peak / 1e12} TB/s ({gpu.name})" for gpu in GPUS)
    issues = f"{MULTIPROCESSORS} multiprocessors, {ISSUES} a cycle, {CLOCK / 1e9} GHz"
    spilled, narrowest = (f(getattr(x, n) for x in found.values()) for f, n in ((max, "spilled"), (min, "narrowest")))
    return [
        f"ESTIMATES for {LARGE}, of code by {compiler(native.LIBRARY, ARCHITECTURE)}; nothing was measured.",
        "",
        f"- registers: of a thread, which spills {spilled} bytes. blocks: of 128 threads, on a multiprocessor.",
        "- in flight: the elements that a multiprocessor's threads load before the first use of any.",
        f"- instructions: that a thread issues for 8 elements; its narrowest access to elements has {narrowest} bytes.",
        f"- estimated: the longer of two times, and which it is. memory: the tensors' bytes at an assumed {copies}.",
        f"  issue: all instructions at {issues}; pipes of half the rate are not considered.",
        "- the percentage: the share of the issue slots that is used in that time.",
    ]


if __name__ == "__main__":
    sys.exit(main())
