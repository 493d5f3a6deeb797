"""List the kinds of guidance that the demo compares, and sample every class with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..guidance import Classifier, ClassifierFree, Guidance
from ..sampling.sampler import Sampler
from ..schedules import NoiseSchedule
from ..solvers import StepTable, ddim, ddpm
from ..step.noise import portable_noise
from .digits import NUM_CLASSES, SHAPE
from .models import NULL_CLASS, Denoiser, NoiseAwareClassifier

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Family = Literal["none", "classifier, epsilon form", "classifier, mean form", "classifier-free", "negative condition"]

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
NEGATIVE_SCALE = 4.0


@dataclass(frozen=True)
class Method:
    """A kind of guidance with a scale, used with a solver; ``scale`` is None without guidance."""

    family: Family
    scale: float | None
    solver: Literal["ddpm", "ddim"]

    @property
    def name(self) -> str:
        """The name in tables and file names."""
        scale = "" if self.scale is None else f", scale {self.scale:g}"
        return f"{self.solver}, {self.family}{scale}"


def all_methods() -> list[Method]:
    """Return every method of the demo. The mean form needs steps with variance, so it is not used with DDIM."""
    methods = []
    for solver in ("ddpm", "ddim"):
        methods.append(Method("none", None, solver))
        methods += [Method("classifier, epsilon form", s, solver) for s in SCALES[1:]]
        if solver == "ddpm":
            methods += [Method("classifier, mean form", s, solver) for s in SCALES[1:]]
        methods += [Method("classifier-free", s, solver) for s in SCALES]
        methods.append(Method("negative condition", NEGATIVE_SCALE, solver))
    return methods


def step_tables(schedule: NoiseSchedule, *, quick: bool) -> dict[str, StepTable]:
    """Return the tables of both solvers by name; both clip x_0 to the range of the images.

    DDIM recomputes epsilon from the clipped x_0 (``use_clipped_model_output``): strong guidance leaves the range at
    once, and an epsilon that does not agree with the clipped x_0 ends in noise.
    """
    return {
        "ddpm": ddpm(schedule, 100 if quick else 250, clip_sample_range=1.0),
        "ddim": ddim(schedule, 25 if quick else 50, clip_sample_range=1.0, use_clipped_model_output=True),
    }


def labels_to_sample(per_class: int) -> Tensor:
    """Return the labels 0, 0, ..., 9, 9, int64 of shape (10 * per_class,)."""
    return torch.arange(NUM_CLASSES).repeat_interleave(per_class)


def sample(
    method: Method,
    table: StepTable,
    denoiser: Denoiser,
    classifier: NoiseAwareClassifier,
    labels: Tensor,
    negative: Tensor,
    seed: int,
    backend: str | None,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Sample images of the labels, shape (n, 1, 8, 8); every method starts from the same noise."""
    null = torch.full_like(labels, NULL_CLASS)
    scale = method.scale or 0.0
    guidance: Guidance | None = None
    cond, uncond, classes = null, None, None
    if method.family.startswith("classifier, "):
        guidance = Classifier(classifier, scale, "mean" if method.family == "classifier, mean form" else "epsilon")
        classes = labels
    elif method.family != "none":
        guidance = ClassifierFree(scale)
        cond, uncond = labels, null if method.family == "classifier-free" else negative[labels]
    sampler = Sampler(denoiser, table, guidance, backend=backend, mesh=mesh)
    return sampler(**noise(len(labels), seed, mesh), cond=cond, uncond=uncond, labels=classes)


def noise(count: int, seed: int, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return where samples begin and what their steps draw from; for a mesh, a seed for each of the samples."""
    if mesh is None:
        generator = torch.Generator().manual_seed(seed)
        return {"x_T": torch.randn(count, *SHAPE, generator=generator), "generator": generator}
    seeds = [(seed * 2**32 + sample) % 2**63 for sample in range(count)]
    return {"x_T": portable_noise(seeds, (count, *SHAPE)), "seeds": seeds}
