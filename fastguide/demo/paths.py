"""Sampling paths in the plane at several guidance scales, on a mixture whose model is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..guidance import ClassifierFree, Guidance
from ..sampling.sampler import Sampler
from ..schedules import NoiseSchedule
from ..solvers import StepTable, dpm_solver
from .mixture import noise_prediction

SCALES = (0.0, 1.0, 3.0)
LABEL = 1
_NULL = -1
_SCHEDULE = NoiseSchedule.linear()


def paths(scale: float, *, samples: int = 300, steps: int = 60, seed: int = 0) -> Tensor:
    """Return samples on their way from noise to data, guided towards one class: shape (steps + 1, samples, 2).

    Every scale starts from the same noise. At scale 0 no class is asked for; at 1 it is the class's own distribution.
    """
    return guided(lambda table: ClassifierFree(scale), samples=samples, steps=steps, seed=seed)


def guided(make: Callable[[StepTable], Guidance], *, samples: int, steps: int, seed: int = 0) -> Tensor:
    """Return the same with any guidance of two predictions, which is made of the loop's table."""
    x_T = torch.randn(samples, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = dpm_solver(_SCHEDULE, steps)
    sampler = Sampler(_model, table, make(table))
    cond = torch.full((samples,), LABEL)
    result = sampler.trajectory(x_T, cond=cond, uncond=torch.full_like(cond, _NULL), originals=False)
    assert result.samples is not None
    return result.samples


def _model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Predict the noise of rows with and without a class, all at one timestep."""
    abar = _SCHEDULE.alphas_cumprod[t[0]].item()
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    with_class = noise_prediction(x, alpha, sigma, LABEL)
    return torch.where((label == _NULL)[:, None], noise_prediction(x, alpha, sigma), with_class)
