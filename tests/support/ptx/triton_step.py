"""Steps a case by the PTX that Triton compiles of its kernels, for a GPU that is not there.

The backend's own code makes the launch's arguments, and Triton's specialises and compiles the kernels for them. Only
in a process in which Triton does not interpret (TRITON_INTERPRET=0).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastguide.step.backends import triton as backend
from fastguide.step.backends import triton_groups, triton_moments
from fastguide.step.operator import StepArguments
from tests.support.ptx.cases import Case
from tests.support.ptx.generate import Code, code_of
from tests.support.ptx.parse import Module, PtxError
from tests.support.ptx.step import Prepared

LANES = 32


class _NoDriver:
    """Stands in for CUDA's driver, as far as a compilation asks."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, LANES)


class TritonKernels:
    """The kernels that cases have asked for so far, and the launches of them."""

    def __init__(self, architecture: int) -> None:
        from triton.runtime.driver import driver

        if backend.INTERPRETED:
            raise PtxError("Triton interprets in this process: it compiles nothing")
        driver.set_active(_NoDriver(architecture))
        backend._compile_and_launch = self._of_step
        triton_moments._compile_and_launch = self._of_weights
        triton_groups._compile_and_launch = self._of_groups
        self._codes: dict[str, tuple[str, Code]] = {}
        self._prepared: list[Prepared] = []

    def prepare(self, a: StepArguments, case: Case) -> Prepared:
        """Return the launch that the backend makes."""
        (prepared,) = self.prepare_all(a)
        return prepared

    def prepare_all(self, a: StepArguments) -> list[Prepared]:
        """Return the launches that the backend makes: of the kernel that makes weights, if there is a program."""
        self._prepared = []
        triton_groups._compiled.clear()  # which remembers what it launched, and here that is nothing
        backend.guided_step(*a)
        return self._prepared

    def _of_step(self, programs: int, arguments: tuple) -> None:
        from fastguide.step.backends import triton_kernel

        warps = arguments[-1][-1] * backend.WARPS // backend.BLOCK
        self._compile(triton_kernel.step_kernel, programs, backend._flat(arguments), warps)

    def _of_weights(self, programs: int, arguments: tuple) -> None:
        from fastguide.step.backends import triton_moments_kernel

        self._compile(triton_moments_kernel.moments_kernel, programs, arguments, triton_moments.WARPS)

    def _of_groups(self, programs: int, arguments: tuple) -> None:
        from fastguide.step.backends import triton_groups_kernel

        self._compile(triton_groups_kernel.grouped_step_kernel, programs, arguments, triton_groups.warps_of(arguments))

    def _compile(self, kernel: Any, programs: int, arguments: tuple, warps: int) -> None:
        compiled = kernel.warmup(*arguments, grid=(programs, 1, 1), num_warps=warps, **backend.OPTIONS)
        text = compiled.asm["ptx"]
        if text not in self._codes:
            module = Module(text)
            (name,) = module.sources
            self._codes[text] = f"{name} {len(self._codes)}", code_of(module, name)
        name, code = self._codes[text]
        values = list(_values(tuple(compiled.src.signature.values()), arguments))
        shared = compiled.metadata.shared
        self._prepared.append(Prepared(name, code, programs, LANES * warps, _parameters(code, values), shared))


def _values(kind: Any, value: Any) -> Any:
    """Yield the numbers and addresses of an argument; a tuple's are those of its parts, and a constant has none."""
    if isinstance(kind, tuple):
        for each, part in zip(kind, value, strict=True):
            yield from _values(each, part)
    elif kind != "constexpr":
        yield value.data_ptr() if isinstance(value, torch.Tensor) else value


def _parameters(code: Code, values: list[int]) -> bytes:
    """Lay out the kernel's parameters: the arguments, and two addresses of memory that it does not use."""
    places = code.kernel.parameter_sizes
    raw = bytearray(code.kernel.parameter_bytes)
    for (place, size), value in zip(places, [*values, 0, 0], strict=True):
        raw[place : place + size] = struct.pack({4: "<I", 8: "<Q"}[size], value % 2 ** (8 * size))
    return bytes(raw)


# ---- Of commands that run some cases ----


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether tensors of 32-bit elements have the same bits."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def report(names: Iterable[str], wrong_of: Callable[[TritonKernels, str], list[str]]) -> int:
    """Run cases for sm_90, and print what is wrong with each; return the exit status."""
    torch.set_num_threads(1)
    kernels, failed = TritonKernels(90), 0
    for name in names:
        found = wrong_of(kernels, name)
        print(f"FAIL {name}: {found[:5]}" if found else f"right: {name}", flush=True)
        failed += bool(found)
    return 1 if failed else 0
