"""What is timed: shapes, solvers, inputs, and the bytes that a fused step must move."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastguide

SCHEDULE = fastguide.NoiseSchedule.linear()
GUIDANCE_SCALE = 7.5
NUM_STEPS = 50
STEP = 20


@dataclass
class Workload:
    """One guided step: two predictions, classifier-free guidance, a solver's update."""

    solver: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    table: fastguide.StepTable = field(init=False)
    sample: Tensor = field(init=False)
    uncond: Tensor = field(init=False)
    cond: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.table = getattr(fastguide, self.solver)(SCHEDULE, NUM_STEPS)
        generator = torch.Generator().manual_seed(0)
        self.sample = torch.randn(self.shape, generator=generator)
        self.uncond, self.cond = (torch.randn(self.shape, generator=generator).to(self.dtype) for _ in range(2))

    @property
    def name(self) -> str:
        return f"{self.solver} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Each input read once, the output written once; noise is not counted, as a generator draws it in place."""
        return self.sample.nbytes * 2 + self.uncond.nbytes + self.cond.nbytes


WORKLOADS = {  # made when they are timed, as the large ones fill hundreds of megabytes
    "small": lambda: Workload("ddim", (1, 4, 64, 64)),
    "small, with noise": lambda: Workload("ddpm", (1, 4, 64, 64)),
    "large": lambda: Workload("ddim", (64, 3, 256, 256)),
    "large, with noise": lambda: Workload("ddpm", (64, 3, 256, 256)),
    "large, bfloat16 model": lambda: Workload("ddim", (64, 3, 256, 256), torch.bfloat16),
}
