"""Time what a step with Triton's kernel takes of the host, without a GPU: stub_driver.cpp is CUDA's driver.

    python -m benchmarks.triton_host

Triton's own launcher is compiled and called; the driver's part of a launch comes on top on a GPU. Needs gcc and
Python's headers, as Triton does. The tensors are on the CPU, and nothing reads them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPE = (1, 4, 64, 64)
TURNS = 30


def main() -> int:
    """Compile the driver's stand-in, and measure in a process that loads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help=f"steps in each of {TURNS} turns (default: 300)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.number)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        source = Path(__file__).with_name("stub_driver.cpp")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", str(source), "-o", str(library)], check=True)
        (Path(folder) / "libcuda.so").symlink_to(library)
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "benchmarks.triton_host", "--measure", "--number", str(options.number)]
        return subprocess.run(command, env=environment).returncode


def measure(number: int) -> dict[str, dict[str, Any]]:
    """Return the microseconds of each call's host, as medians; and whether the kernel got the tensors' pointers."""
    backend = stand_in()
    import fastguide

    table, guidance = fastguide.ddim(fastguide.NoiseSchedule.linear(), 50), fastguide.ClassifierFree(7.5)
    normalized = fastguide.Normalized(4.0, dim=-1)
    x, out, both = torch.randn(SHAPE), torch.empty(SHAPE), torch.randn(2, *SHAPE[1:])
    pair = [torch.randn(SHAPE) for _ in range(2)]
    driver = ctypes.CDLL("libcuda.so.1")
    launches = ctypes.c_long.in_dll(driver, "fastguide_launches")
    parameters = (ctypes.c_void_p * 8).in_dll(driver, "fastguide_parameters")

    def calling(predictions: Any, guidance: fastguide.Guidance) -> Callable[[], Any]:
        return lambda: fastguide.guided_step(table, 3, x, predictions, guidance, out=out, backend=backend)

    found: dict[str, dict[str, Any]] = {}
    for name, predictions, each in (
        ("a list of predictions", pair, guidance),
        ("one tensor of all", both, guidance),
        ("norms of each row", pair, normalized),
    ):
        step, parts = calling(predictions, each), list(both.chunk(2)) if predictions is both else pair
        for _ in range(10):
            step()
        before = launches.value
        seconds = timeit.repeat(step, number=number, repeat=TURNS)
        found[name] = {
            "microseconds": round(statistics.median(seconds) / number * 1e6, 2),
            "launches": launches.value - before,
            "pointers": parameters[:4] == [tensor.data_ptr() for tensor in (out, x, *parts)],
        }
    return found


def stand_in() -> str:
    """Let Triton and fastguide take the CPU for a GPU, as far as launches go; return the backend's name."""
    stands: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "is_current_stream_capturing": lambda: False,
    }
    for name, function in stands.items():
        setattr(torch.cuda, name, function)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    CudaDriver.is_active = staticmethod(lambda: True)
    driver: Any = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_device_capability = lambda *_: (9, 0)
    driver.get_current_stream = lambda _: 0
    triton.runtime.driver.set_active(driver)

    from fastguide.step.backends import triton as module
    from fastguide.step.backends.registry import BACKENDS

    ours: Any = module
    gpu, launch, relaunch = torch.device("cuda", 0), ours._launch, ours.Relaunch.__init__

    def remember(self: Any, arguments: Any) -> None:
        relaunch(self, arguments)
        self._device = gpu

    ours._launch = lambda programs, arguments, _: launch(programs, arguments, gpu)
    ours.Relaunch.__init__ = remember
    BACKENDS["triton"] = ours.backend()._replace(devices=("cpu",), makes_weights=("cpu",))
    return "triton"


if __name__ == "__main__":
    sys.exit(main())
