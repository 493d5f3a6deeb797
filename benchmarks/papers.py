"""One step as the papers have it, from the schedule's alphas_cumprod: no table, row or kernel of fastguide's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .workloads import COMPOSED_SCALES, GRADIENT_SCALE, NUM_STEPS, SCHEDULE, STEP, Inputs


def abar_at(steps: int, index: int) -> tuple[float, float]:
    """abar at a step, and at the one after it, which is 1 after the last."""
    taken: list[float] = [*SCHEDULE.alphas_cumprod[SCHEDULE.timesteps(steps)].tolist(), 1.0]
    return taken[index], taken[index + 1]


def predicted_x0(a: float, x: Tensor, epsilon: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar) epsilon) / sqrt(abar) (Ho et al. 2020, eq. 15)."""
    return (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)


def ddim(a: float, before: float, x: Tensor, epsilon: Tensor) -> Tensor:
    """Song et al. 2021, eq. 12 with sigma = 0."""
    return math.sqrt(before) * predicted_x0(a, x, epsilon) + math.sqrt(1 - before) * epsilon


def ddpm_mean(a: float, before: float, x: Tensor, x0: Tensor) -> Tensor:
    """The posterior's mean (Ho et al. 2020, eq. 7)."""
    alpha = a / before
    return (math.sqrt(before) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - before) * x) / (1 - a)


def ddpm_variance(a: float, before: float) -> float:
    """The posterior's variance (Ho et al. 2020, eq. 7)."""
    return (1 - before) / (1 - a) * (1 - a / before)


def step(i: Inputs, noise: Tensor | None) -> Tensor:
    """A workload's next sample, in float64."""
    w, (a, before) = i.workload, abar_at(NUM_STEPS, STEP)
    x, predictions = i.sample.double(), [prediction.double() for prediction in i.predictions]
    z = torch.zeros_like(x) if noise is None else noise.double()
    if w.solver == "add_noise":
        return math.sqrt(a) * x + math.sqrt(1 - a) * z  # Ho et al. 2020, eq. 4
    epsilon = predictions[0]
    for scale, prediction in zip(COMPOSED_SCALES, predictions[1:], strict=False):
        epsilon = epsilon + scale * (prediction - predictions[0])  # Liu et al. 2022, eq. 11
    gradient = None if i.gradient is None else GRADIENT_SCALE * i.gradient.double()
    if gradient is not None and w.form == "epsilon":
        epsilon = epsilon - math.sqrt(1 - a) * gradient  # Dhariwal and Nichol 2021, algorithm 2
    if w.solver == "ddim":
        return ddim(a, before, x, epsilon)
    x0 = predicted_x0(a, x, epsilon)
    if w.solver.endswith("clipped"):
        x0 = x0.clamp(-1, 1)
    variance = torch.tensor(ddpm_variance(a, before), dtype=torch.float64, device=x.device)
    if i.variance is not None:  # Nichol and Dhariwal 2021, eq. 15
        part = (i.variance.double() + 1) / 2
        variance = torch.exp(part * math.log(1 - a / before) + (1 - part) * torch.log(variance))
    mean = ddpm_mean(a, before, x, x0)
    if gradient is not None and w.form == "mean":
        mean = mean + variance * gradient  # Dhariwal and Nichol 2021, algorithm 1
    return mean + variance.sqrt() * z
