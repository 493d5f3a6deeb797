"""The workloads: guided steps of the shapes, dtypes, guidances and solvers that people run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastguide import Classifier, ClassifierFree, Composed, Guidance, NoiseSchedule, StepTable, ddim, ddpm

SCHEDULE = NoiseSchedule.scaled_linear()
GUIDANCE_SCALE, GRADIENT_SCALE = 7.5, 1.3
COMPOSED_SCALES = (GUIDANCE_SCALE, 2.0, -1.0)
NUM_STEPS, STEP = 50, 20

SHAPES = {
    "SD 512": (1, 4, 64, 64),
    "SDXL": (1, 4, 128, 128),
    "16 channels": (1, 16, 128, 128),
    "video": (1, 16, 21, 60, 104),
    "pixels": (64, 3, 256, 256),
}
SOLVERS = ("ddim", "ddpm", "ddpm learned", "ddpm clipped", "add_noise")
GUIDANCES = ("none", "classifier-free", "composed", "epsilon gradient", "mean gradient")


class NotRunError(Exception):
    """A contender cannot run a workload on this machine; the message says why."""


def abar_at(steps: int, index: int) -> tuple[float, float]:
    """Return abar at a step and at the one after it, which is 1 after the last."""
    visited: list[float] = [*SCHEDULE.alphas_cumprod[SCHEDULE.timesteps(steps)].tolist(), 1.0]
    return visited[index], visited[index + 1]


@dataclass(frozen=True)
class Workload:
    """One step: ``dtype`` is the dtype of the model's outputs, ``state`` that of the sample."""

    name: str
    shape: tuple[int, ...]
    solver: str = "ddim"
    guidance: str = "classifier-free"
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        """Describe the workload: name, solver, guidance, shape and dtype."""
        dtype = str(self.dtype).removeprefix("torch.")
        dtype += "" if self.state == torch.float32 else f", state {str(self.state).removeprefix('torch.')}"
        parts = [self.name, self.solver, self.guidance, str(tuple(self.shape)), dtype]
        return ", ".join(part for part in parts if part != "none")

    @property
    def count(self) -> int:
        """The number of predictions."""
        if self.solver == "add_noise":
            return 0
        return {"classifier-free": 2, "composed": 4}.get(self.guidance, 1)

    @property
    def form(self) -> str | None:
        """The form of the classifier's gradient: epsilon or mean; ``None`` without one."""
        return self.guidance.partition(" ")[0] if self.guidance.endswith("gradient") else None


@dataclass
class Inputs:
    """The tensors of a workload on a device; the same values at each call."""

    workload: Workload
    device: torch.device
    sample: Tensor = field(init=False)
    predictions: list[Tensor] = field(init=False)
    gradient: Tensor | None = field(init=False)
    variance: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        w, generator = self.workload, torch.Generator().manual_seed(0)

        def draw(dtype: torch.dtype) -> Tensor:
            return torch.randn(w.shape, generator=generator).to(self.device, dtype)

        self.sample = draw(w.state)
        self.predictions = [draw(w.dtype) for _ in range(w.count)]
        self.gradient = draw(w.dtype) if w.form is not None else None
        self.variance = draw(w.dtype).clamp_(-1, 1) if w.solver == "ddpm learned" else None

    @cached_property
    def table(self) -> StepTable:
        """The step table; for ``add_noise`` a table whose steps do just that."""
        solver = self.workload.solver
        if solver == "ddim":
            table = ddim(SCHEDULE, NUM_STEPS)
        elif solver == "add_noise":
            abar = SCHEDULE.alphas_cumprod[SCHEDULE.timesteps(NUM_STEPS)]
            columns = {"out_sample": abar.sqrt(), "out_noise": (1 - abar).sqrt()}
            table = StepTable.from_columns(SCHEDULE.timesteps(NUM_STEPS), columns, name=solver)
        else:
            table = ddpm(
                SCHEDULE,
                NUM_STEPS,
                variance_type="learned_range" if solver.endswith("learned") else "fixed_small",
                clip_sample_range=1.0 if solver.endswith("clipped") else None,
            )
        return table.to(self.device)

    @cached_property
    def guidance(self) -> Guidance | None:
        """The guidance; ``None`` if the step has one prediction or none."""
        kind = self.workload.guidance
        if self.workload.solver == "add_noise" or kind == "none":
            return None
        if kind == "classifier-free":
            return ClassifierFree(GUIDANCE_SCALE)
        if kind == "composed":
            return Composed(list(COMPOSED_SCALES))
        return Classifier(None, GRADIENT_SCALE, "mean" if self.workload.form == "mean" else "epsilon")

    @property
    def terms(self) -> dict[str, Tensor]:
        """The step's tensors beside sample, predictions and noise, by their names in ``plain_torch.Terms``."""
        found = {"variance": self.variance, f"{self.workload.form}_gradient": self.gradient}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def noisy(self) -> bool:
        """Whether the step adds noise."""
        return self.table.adds_noise[STEP]

    @property
    def bytes(self) -> int:
        """Bytes to move: each input read once, the output written once, no noise, as a kernel may draw it in place."""
        tensors = [self.sample, self.sample, *self.predictions, self.gradient, self.variance]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def quick() -> list[Workload]:
    """Return the workloads that tell most; they take a minute."""
    pixels, bf16, fp16 = SHAPES["pixels"], torch.bfloat16, torch.float16
    return [
        Workload("SD 512", SHAPES["SD 512"]),
        Workload("SD 512", SHAPES["SD 512"], "ddpm"),
        Workload("SDXL", SHAPES["SDXL"], dtype=bf16),
        Workload("SDXL", SHAPES["SDXL"], dtype=bf16, state=bf16),
        Workload("SDXL", SHAPES["SDXL"], guidance="epsilon gradient"),
        Workload("16 channels", SHAPES["16 channels"], guidance="composed", dtype=bf16),
        Workload("16 channels", SHAPES["16 channels"], "ddpm learned", "mean gradient"),
        Workload("video", SHAPES["video"], dtype=fp16),
        Workload("pixels", pixels),
        Workload("pixels", pixels, "ddpm clipped"),
        Workload("pixels", pixels, dtype=bf16),
        Workload("SDXL", SHAPES["SDXL"], "add_noise", "none"),
    ]


def large() -> list[Workload]:
    """Return workloads of more than 256 MB, which show a GPU's bandwidth."""
    shape, bf16 = (128, *SHAPES["pixels"][1:]), torch.bfloat16
    return [Workload("pixels, batch 128", shape), Workload("pixels, batch 128", shape, dtype=bf16, state=bf16)]


def full() -> list[Workload]:
    """Vary each shape, solver, guidance and dtype by itself around the quick workloads, and the batch from 1 to 64."""
    found = quick() + large()
    for name, shape in SHAPES.items():
        for dtype in (torch.float16, torch.bfloat16):
            found += [Workload(name, shape, dtype=dtype), Workload(name, shape, dtype=dtype, state=dtype)]
        found += [Workload(name, shape, solver, "classifier-free") for solver in SOLVERS[:-1]]
    for guidance in GUIDANCES:
        solvers = ("ddpm",) if guidance == "mean gradient" else ("ddim", "ddpm")  # DDIM has no variance to move by
        found += [Workload("SDXL", SHAPES["SDXL"], solver, guidance) for solver in solvers]
    found += [Workload(f"SD 512, batch {b}", (b, 4, 64, 64)) for b in (4, 16, 64)]
    found += [Workload(name, shape, "add_noise", "none") for name, shape in SHAPES.items()]
    return list(dict.fromkeys(found))
