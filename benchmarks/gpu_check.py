"""Prove on a GPU what needs one, in stages: build, tests, loops, times, sanitizers.

    python -m benchmarks.gpu_check --output benchmarks/results/gpu.json
    python -m benchmarks.gpu_check --output benchmarks/results/gpu.json --only times sanitizers

A command ends after ``--seconds``, and the next one adds its stages to the record. A machine without a compiler can
be given a library that was built elsewhere for its GPU, as ``fastguide/_native.so``: ``--no-build``. The tests need
pytest, and the loops diffusers; what else is missing is said in the record. That holds the date, the GPU, driver and
versions, the tests that ran and failed, the sanitizers' results, and every time, each beside the ceiling and the
rivals of the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

OURS = ("native", "triton")
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "tests", "loops", "times", "sanitizers")
TIMED = ("cursor", "small", "large", "backward")
Record = dict[str, Any]

TARGETS = {
    "large, no noise": 0.92,  # of the bandwidth of a copy; this and the next for float32 states alone
    "large, noise in the kernel": 0.85,
    "large, backward": 0.85,
    "small, GPU us": 3.0,
    "cursor, GPU us": 2.5,
    "native, host us": 10.0,
    "triton, host us": 20.0,
}


class Deadline:
    """The end of this command's time, which each stage may use up."""

    end = float("inf")

    @classmethod
    def left(cls) -> float:
        """Return the seconds that are left, at least 1."""
        return max(cls.end - time.time(), 1.0)


def run(command: list[str], timeout: float = float("inf")) -> Record:
    """Run a command, and return its exit status (None: it ran out of time), seconds and output."""
    begin = time.time()
    timeout = min(timeout, Deadline.left())
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        status, output = result.returncode, result.stdout + result.stderr
    except subprocess.TimeoutExpired as expired:
        parts = (expired.stdout or b"", expired.stderr or b"")
        status, output = None, "".join(p.decode(errors="replace") if isinstance(p, bytes) else p for p in parts)
    print(f"{' '.join(command)}\n  exit {status} after {time.time() - begin:.0f} s\n{output[-6000:]}", flush=True)
    return {"command": command[1:], "exit": status, "seconds": round(time.time() - begin, 1), "output": output}


def build() -> Record:
    """Build into this checkout for this GPU only: the code for other architectures is the same source."""
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}+PTX"
    os.environ["FASTGUIDE_CUDA"] = "1"
    if shutil.which("nvcc") is None:  # images often have it here, and no path to it
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    return run(pip)


def test() -> Record:
    """Run the tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "tests", "-v", "-m", "gpu", "-rfEs", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:  # several cores: Triton compiles a kernel for each variant
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    record = run(command)
    output = str(record["output"])
    record["summary"] = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", output[-300:])
    record["failed"] = sorted(set(re.findall(r"^(?:FAILED|ERROR) (tests/\S+.*?)(?: - .*)?$", output, re.M)))
    record["output"] = output[output.find("FAILURES") :][:20000] if record["failed"] else output[-2000:]
    return record


def sanitize() -> Record:
    """Run compute-sanitizer over a few cases, if it is installed and supports the device."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # otherwise memcheck sees blocks of torch's cache, not tensors
    record: Record = {}
    for backend in OURS:
        cases = [sys.executable, "-m", "benchmarks.gpu_cases", backend]
        record[backend] = run(cases, 90)  # this also compiles Triton's kernels
        for check in ("memcheck", "racecheck"):
            result = record[f"{backend} {check}"] = run([tool, "--tool", check, "--error-exitcode", "9", *cases], 60)
            if "Device not supported" in str(result["output"]):
                del record[f"{backend} {check}"]
                return {**record, "not run": "compute-sanitizer: Device not supported"}
    for result in record.values():
        result["output"] = str(result["output"])[-2000:]
    return record


def machine() -> Record:
    """Return the GPU and the versions."""
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(smi, capture_output=True, text=True).stdout.strip() if shutil.which(smi[0]) else None
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
        "nvidia-smi": found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
    }


def measure(write: Callable[[Record], None]) -> None:
    """Take all times; each is printed and written as soon as it is measured."""
    from .measure.gpu import measure_cursor, measure_large, measure_small, measure_torch_generator
    from .measure.gpu_backward import measure_backward

    times: Record = {}
    suites = {"cursor": measure_cursor, "small": measure_small, "large": measure_large, "backward": measure_backward}
    for name, rows in ((name, suite()) for name, suite in suites.items()):
        found: list[Record] = []
        times[name] = found
        for row in rows:
            print(row, flush=True)
            found.append(row)
            write(times)
            if Deadline.left() < 60:
                break
    times["torch_generator_host_microseconds"] = measure_torch_generator()
    write(times)


def loops() -> Record:
    """Time whole loops beside diffusers', if it is installed."""
    if importlib.util.find_spec("diffusers") is None:
        return {"not run": "diffusers is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "loops.json"
        command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--only", "loops", "--workload"]
        record = run([*command, "tiny UNet, 50 steps", "--json", str(numbers), "--output", folder])
        record["output"] = str(record["output"])[-3000:]
        return record | ({"results": json.loads(numbers.read_text())} if numbers.exists() else {})


def loop_misses(loops: Record) -> list[str]:
    """Describe each missed target of a loop."""
    targets = [row for row in loops.get("results", {}).get("rows", []) if row["suite"] == "targets"]
    missed = [row for row in targets if "loop" in row["target"] and row["status"] != "met"]
    return [f"{row['target']}: expected {row['expected']}, got {row.get('measured', row['reason'])}" for row in missed]


def misses(times: Record) -> list[str]:
    """Describe each missed target of a step."""
    found = []
    for row in (*times.get("large", []), *times.get("backward", [])):
        kind = {None: "backward", "none": "no noise", "given": "no noise"}.get(row.get("noise"), "noise in the kernel")
        target, name = TARGETS[f"large, {kind}"], row["name"]
        for backend in OURS:
            share = row["share_of_copy"].get(backend)
            if share is not None and share < target and row.get("state") == "float32":
                found.append(f"{name}: {backend} reaches {share:.1%} of the copy's bandwidth, expected {target:.0%}")
        found += slower(name, row["microseconds"])
    for size, row in [("small", row) for row in times.get("small", [])] + [
        ("cursor", row) for row in times.get("cursor", [])
    ]:
        name = row["name"]
        for backend in OURS:
            for kind, target in (("gpu", TARGETS[f"{size}, GPU us"]), ("host", TARGETS[f"{backend}, host us"])):
                value = row[f"{kind}_microseconds"].get(backend)
                if value is not None and value > target:
                    found.append(f"{name}: {backend} {kind} {value:.1f} us, expected {target}")
        found += slower(name, row["gpu_microseconds"])
    return found


def slower(name: str, microseconds: dict[str, float]) -> list[str]:
    """Describe where a rival is faster than a backend of ours by more than 2 %, which two runs of one kernel differ."""
    return [
        f"{name}: {backend} takes {microseconds[backend]:.2f} us, {rival} {microseconds[rival]:.2f} us"
        for backend in OURS
        for rival in ("torch.compile", "plain triton")
        if backend in microseconds and rival in microseconds and microseconds[backend] > 1.02 * microseconds[rival]
    ]


def failures(record: Record) -> list[str]:
    """Describe everything that went wrong; what was not run for a stated reason did not."""
    found = [f"{name}: not run" for name in STAGES[1:] if name not in record]
    for name in ("build", "tests", "loops"):
        if name in record and record[name].get("exit", 0) != 0:
            found.append(f"{name}: exit {record[name]['exit']}")
    for check, result in record.get("sanitizers", {}).items():
        if check != "not run" and result["exit"] is None:
            found.append(f"{check}: ran out of time")
        elif check != "not run" and result["exit"] != 0:
            found.append(f"{check}: exit {result['exit']}")
    for rows in (record.get("times", {}).get(size, []) for size in TIMED):
        found += [f"{row['name']}: {name}: {error}" for row in rows for name, error in row["errors"].items()]
    found += [f"backend {name}: {status}" for name, status in record["backends missing"].items()]
    return found


def stages(names: Sequence[str], record: Record, write: Callable[[str, Any], None]) -> None:
    """Run these stages in their order, and judge all that the record then has; ``write`` saves each part of it."""
    if "build" in names:
        write("build", build())
    from fastguide.step.backends.registry import BACKENDS  # after the build

    write("backends missing", {n: BACKENDS[n].status for n in OURS if not BACKENDS[n].serves("cuda")})
    if "tests" in names:
        write("tests", test())
    if "loops" in names:
        write("loops", loops())
    if "times" in names:
        measure(lambda times: write("times", times))
    if "sanitizers" in names:
        write("sanitizers", sanitize())
    write("misses", misses(record.get("times", {})) + loop_misses(record.get("loops", {})))
    write("failures", failures(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for; the exit status is 1 if anything failed or missed its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the record to this file, as JSON, after each stage")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--no-build", action="store_true", help="use the library as it is")
    parser.add_argument("--seconds", type=float, default=570, help="when to end (default: 570)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: expected a GPU that torch sees, got none", file=sys.stderr)
        return 2
    Deadline.end = time.time() + options.seconds
    record: Record = {}
    if options.only and options.output is not None and options.output.exists():
        record.update(json.loads(options.output.read_text()))
    names = [name for name in options.only or STAGES if not (options.no_build and name == "build")]
    record.setdefault("machines", []).append(machine() | {"stages": names})

    def write(name: str, result: Any) -> None:
        record[name] = result
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=2) + "\n")

    stages(names, record, write)
    for name in ("failures", "misses"):
        print("\n".join([f"\n{name}: {len(record[name])}", *record[name]]))
    return 0 if not record["failures"] and not record["misses"] else 1


if __name__ == "__main__":
    sys.exit(main())
