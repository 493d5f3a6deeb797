"""Compiles the Triton kernel that steps groups of elements ahead of time, for tests that interpret it themselves.

python tests/support/compile_triton_groups.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastguide import AdaptiveProjected, Normalized
from fastguide.step.backends import triton as backend
from fastguide.step.backends import triton_groups
from tests.step.test_groups import ADDS_NOISE, grouped, of_three

NORMALIZED, PROJECTED = Normalized(4.0, dim=-1), AdaptiveProjected(4.0, norm_threshold=2.0, norm_dim=-1)
BFLOAT16 = torch.bfloat16
CASES = {  # guidance, shape, dtype of the predictions, whether the sample has it too, whether noise is drawn
    "tokens in 16 bits": (NORMALIZED, (2, 64, 128), BFLOAT16, True, False),
    "portable noise": (PROJECTED, (2, 64, 64), BFLOAT16, False, True),
    "three and the sample": (of_three(2.0), (2, 64, 48), torch.float32, False, False),
    "a large group": (PROJECTED, (2, 2, 16384), BFLOAT16, False, False),
}
TARGETS = {GPUTarget("cuda", 90, 32): tuple(CASES), GPUTarget("hip", "gfx942", 64): ("three and the sample",)}


def arguments_of(guidance, shape, dtype, rounded, noise):
    """The operator's arguments."""
    arguments = grouped(guidance, shape, dtype)
    if rounded:
        arguments = arguments._replace(sample=arguments.sample.to(dtype), out=arguments.out.to(dtype))
    if noise:
        rows = ADDS_NOISE.device_rows(None, torch.float32)
        arguments = arguments._replace(rows=rows, seeds=torch.arange(len(arguments.sample)))
    return arguments


class Driver:
    """Stands in for a GPU's driver, as far as a compilation asks."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return self.target.arch  # by which Triton keeps what it has compiled

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return self.target


def main(folder: Path) -> None:
    from fastguide.step.backends.triton_groups_kernel import grouped_step_kernel

    def compiled(programs, arguments):
        warps = triton_groups.warps_of(arguments)
        found = grouped_step_kernel.warmup(*arguments, grid=(programs, 1, 1), num_warps=warps, **backend.OPTIONS)
        for kind, code in found.asm.items():
            if kind in ("ptx", "cubin", "amdgcn"):
                (folder / f"{name}.{kind}").write_bytes(code if isinstance(code, bytes) else code.encode())

    triton_groups._compile_and_launch = compiled
    for target, cases in TARGETS.items():
        driver.set_active(Driver(target))
        triton_groups._compiled.clear()
        for name in cases:
            backend.guided_step(*arguments_of(*CASES[name]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
