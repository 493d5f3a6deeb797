"""Everything that takes a GPU to be proved, in one command of less than eight minutes: build, test, sanitize, measure.

    python -m benchmarks.gpu_check --output benchmarks/results/gpu.json

The record holds the date, the GPU, driver and versions, which tests ran and failed, what the sanitizers said and every
time measured, each beside the ceiling and the competitors of the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"large, no noise": 0.92, "large, noise in the kernel": 0.85, "small, GPU us": 3.0, "small, host us": 20.0}


def run(command: list[str], timeout: float) -> dict[str, object]:
    """A command's exit status, seconds and the end of its output."""
    begin = time.time()
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        status, output = result.returncode, result.stdout + result.stderr
    except subprocess.TimeoutExpired as expired:
        parts = (expired.stdout or b"", expired.stderr or b"")
        status, output = None, "".join(p.decode(errors="replace") if isinstance(p, bytes) else p for p in parts)
    print(f"{' '.join(command)}\n  exit {status} after {time.time() - begin:.0f} s\n{output[-3000:]}", flush=True)
    return {"command": command[1:], "exit": status, "seconds": round(time.time() - begin, 1), "end": output[-3000:]}


def build() -> dict[str, object]:
    """Into this checkout, for this GPU alone: the other architectures' code is the same source."""
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}+PTX")
    os.environ["FASTGUIDE_CUDA"] = "1"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    return run(pip, 120)


def test() -> dict[str, object]:
    """The tests marked gpu: the cases of every backend, and what only a GPU can show."""
    record = run([sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-rs", "--tb=short"], 200)
    record["summary"] = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", str(record["end"]))
    return record


def sanitize() -> dict[str, object]:
    """compute-sanitizer over a small set of cases, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    return {
        check: run([tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_cases"], 60)
        for check in ("memcheck", "racecheck")
    }


def machine() -> dict[str, object]:
    """What was measured on."""
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "nvidia-smi": smi.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
    }


def measure() -> dict[str, object]:
    """All timings, printed as they come."""
    from .gpu_measure import measure_large, measure_small, measure_torch_generator

    large, small = [], []
    for row in measure_large():
        print(row, flush=True)
        large.append(row)
    for row in measure_small():
        print(row, flush=True)
        small.append(row)
    return {"large": large, "small": small, "torch_generator_host_microseconds": measure_torch_generator()}


def misses(times: dict[str, object]) -> list[str]:
    """Where a target is missed, in words."""
    found = []
    for row in times["large"]:
        target = TARGETS["large, no noise" if row["noise"] in ("none", "given") else "large, noise in the kernel"]
        name = f"large, {row['state']}, {row['model']}, noise {row['noise']}"
        for backend in ("native", "triton"):
            share = row["share_of_copy"].get(backend)
            if share is not None and share < target:
                found.append(f"{name}: {backend} reaches {share:.1%} of the copy's bandwidth, expected {target:.0%}")
        ours = min(t for b, t in row["microseconds"].items() if b in ("native", "triton"))
        for rival in ("torch.compile", "plain triton"):
            if rival in row["microseconds"] and ours > row["microseconds"][rival]:
                found.append(f"{name}: {rival} is faster, {row['microseconds'][rival]:.1f} us against {ours:.1f} us")
    for row in times["small"]:
        for backend in ("native", "triton"):
            for kind, target in (("gpu", TARGETS["small, GPU us"]), ("host", TARGETS["small, host us"])):
                value = row[f"{kind}_microseconds"].get(backend)
                if value is not None and value > target:
                    found.append(
                        f"small {row['shape']}, noise {row['noise']}: {backend} {kind} {value:.1f} us > {target}"
                    )
    return found


def main() -> int:
    """Run it all; the exit status says whether anything failed or missed its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the record here, as JSON")
    parser.add_argument("--no-build", action="store_true", help="take the library as it is")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: expected a GPU that torch sees, got none", file=sys.stderr)
        return 2
    record: dict[str, object] = {"machine": machine()}
    if not options.no_build:
        record["build"] = build()
    record["tests"] = test()
    record["sanitizers"] = sanitize()
    times = measure()
    record["times"], record["misses"] = times, misses(times)
    print("\n".join(["", "misses:", *record["misses"]]) if record["misses"] else "\nall targets reached")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if record["tests"]["exit"] == 0 and not record["misses"] else 1


if __name__ == "__main__":
    sys.exit(main())
