"""The ratios that the README states: all contenders in turns, in one run, medians; a table, and JSON with --output.

python -m benchmarks.compare --output benchmarks/results/cpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import diffusers
import torch

import fastguide
from fastguide.ops import BACKENDS

from .contenders import CONTENDERS, check, contenders, copy_ceiling, randn_ceiling
from .workloads import WORKLOADS, Workload


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def measure(workload: Workload, seconds: float) -> dict[str, float]:
    """Median microseconds of every contender and ceiling. In turns: a busy neighbour slows all of them alike."""
    torch._dynamo.reset()  # or the formula would reach the limit of recompilations
    calls = {}
    for name in contenders(workload):
        check(workload, name)
        calls[name] = CONTENDERS[name](workload)
    calls["copy_ of the same bytes"] = copy_ceiling(workload)
    if workload.table.adds_noise_anywhere:
        calls["torch's noise alone"] = randn_ceiling(workload)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(5):
                call()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    """Measure and print; write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the results here, as JSON")
    parser.add_argument("--seconds", type=float, default=10.0, help="per workload (default: %(default)s)")
    options = parser.parse_args()
    results = {}
    for make in WORKLOADS.values():
        workload = make()
        medians = measure(workload, options.seconds)
        results[workload.name] = medians
        print(f"\n{workload.name}: {workload.bytes / 1e6:.1f} MB")
        for name, microseconds in medians.items():
            rate = workload.bytes / microseconds / 1e3
            ratio = microseconds / medians["fastguide out"]
            print(f"  {name:<24} {microseconds:10.1f} us  {rate:7.1f} GB/s  {ratio:6.2f} x fastguide out")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "fastguide": fastguide.__version__,
            "native": BACKENDS["native"].status,
        }
        record = {"machine": machine, "median_microseconds": results}
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
