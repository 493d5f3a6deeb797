"""Whole loops against float64: how far each is off after 50 steps by the dtype of the model's output, and how fast."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastguide.guidance import ClassifierFree
from fastguide.solvers import ddim, ddpm
from fastguide.step.guided_step import guided_step
from fastguide.step.noise import portable_noise

from .. import papers
from ..contenders import plain_torch as formula
from ..contenders.registry import is_ours
from ..contenders.the_field import GuidedDiffusion, scheduler
from ..workloads import GUIDANCE_SCALE, SCHEDULE, STEP, NotRunError
from .caches import between
from .timing import in_turns, said

STEPS, SCALE, SHAPE = 50, GUIDANCE_SCALE, (1, 4, 64, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Step: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""The next sample, from a step's index, the sample, both predictions and the noise."""


@torch.no_grad()
def measure(device: torch.device, seconds: float = 0.3) -> Iterator[dict[str, Any]]:
    """A row for each solver, dtype and contender: the loop's error, and the time of one of its steps by itself."""
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    before = between(5 * x_T.nbytes, x_T.nbytes)
    for solver in ("ddim", "ddpm"):
        truth = _loop(_textbook(solver), x_T.double(), torch.float64)
        for dtype in DTYPES:
            rows: dict[str, dict[str, Any]] = {}
            calls = {}
            for name, make in CONTENDERS.items():
                row: dict[str, Any] = {
                    "suite": "accuracy",
                    "solver": solver,
                    "dtype": str(dtype)[6:],
                    "contender": name,
                }
                # As pipelines keep their latents: diffusers' in the model's dtype
                x = x_T.to(dtype) if name == "diffusers" else x_T
                try:
                    step = make(solver, device)
                    error = float((_loop(step, x, dtype).double() - truth).norm() / truth.norm())
                except NotRunError as reason:
                    yield row | {"status": "not run", "reason": str(reason)}
                    continue
                except Exception as failure:  # said, and the others are measured
                    yield row | {"status": "failed" if is_ours(name) else "not run", "reason": said(failure)}
                    continue
                rows[name] = row | {"status": "ok", "error": error}
                low, high = (x_T.flip(d).to(dtype) for d in (2, 3))
                noise = _noise(STEP, device).to(x.dtype)
                calls[name] = lambda step=step, x=x, low=low, high=high, z=noise: step(STEP, x, low, high, z)
            timed = in_turns(calls, seconds, device, before=before)
            for name, row in rows.items():
                if name in timed.failures:
                    yield row | {
                        "status": "failed" if is_ours(name) else "not run",
                        "reason": said(timed.failures[name]),
                    }
                else:
                    yield row | {"seconds": timed.times[name].median}


def _loop(step: Step, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The guided loop, over a model's predictions in a dtype."""
    timesteps = SCHEDULE.timesteps(STEPS).tolist()
    for index, timestep in enumerate(timesteps):
        low, high = (_prediction(x, timestep, mean).to(dtype) for mean in (0.0, 1.0))
        x = step(index, x, low, high, _noise(index, x.device).to(x.dtype))
    return x


def _prediction(x: Tensor, timestep: int, mean: float) -> Tensor:
    """The exact noise prediction for normal images of this mean and deviation 0.5, in float64."""
    a = SCHEDULE.alphas_cumprod[timestep].to(x.device)
    return (1 - a).sqrt() * (x.double() - a.sqrt() * mean) / (a * 0.25 + 1 - a)


def _noise(step: int, device: torch.device) -> Tensor:
    return portable_noise(range(SHAPE[0]), SHAPE, step=step, device=device)


def _textbook(solver: str) -> Step:
    """In float64, from the papers."""

    def step(index: int, x: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        a, before = papers.abar_at(STEPS, index)
        epsilon = low + SCALE * (high - low)
        if solver == "ddim":
            return papers.ddim(a, before, x, epsilon)
        mean = papers.ddpm_mean(a, before, x, papers.predicted_x0(a, x, epsilon))
        return mean + math.sqrt(papers.ddpm_variance(a, before)) * noise

    return step


def _fastguide(solver: str, device: torch.device) -> Step:
    """The state in float32, the model's outputs as they are."""
    table = (ddim if solver == "ddim" else ddpm)(SCHEDULE, STEPS).to(device)
    guidance = ClassifierFree(SCALE)
    if solver == "ddim":
        return lambda index, x, low, high, noise: guided_step(table, index, x, [low, high], guidance)
    return lambda index, x, low, high, noise: guided_step(table, index, x, [low, high], guidance, noise=noise)


def _torch(solver: str, device: torch.device) -> Step:
    """The state in float32, and everything computed in it."""
    columns = (ddim if solver == "ddim" else ddpm)(SCHEDULE, STEPS).coefficients()
    rows = [{name: float(values[index]) for name, values in columns.items()} for index in range(STEPS)]
    noisy = [row["out_noise"] != 0 for row in rows]
    steps = [formula.step_function(row, 2, in_a_tensor=False, noise=row["out_noise"] != 0)[0] for row in rows]

    def step(index: int, x: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        return steps[index](x, low, high, *([noise] if noisy[index] else []))

    return step


def _diffusers(solver: str, device: torch.device) -> Step:
    """As a pipeline in the model's dtype; instead of its own noise it gets everybody's, in the dtype that it draws."""
    theirs = scheduler(solver, STEPS, device)
    module: Any = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    drawn = module.randn_tensor

    def step(index: int, x: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        output = low + SCALE * (high - low)
        result: Tensor
        if solver == "ddim":
            result = theirs.step(output, theirs.timesteps[index], x).prev_sample
            return result

        def given(shape: object, dtype: torch.dtype, **options: object) -> Tensor:
            return noise.to(dtype)

        module.randn_tensor = given
        try:
            result = theirs.step(output, theirs.timesteps[index], x).prev_sample
        finally:
            module.randn_tensor = drawn
        return result

    return step


def _guided_diffusion(solver: str, device: torch.device) -> Step:
    """The state in float32, as it is there whatever the model computes in."""
    theirs = GuidedDiffusion(SCHEDULE.alphas_cumprod[SCHEDULE.timesteps(STEPS)], device)
    kind = theirs.ddim_sample if solver == "ddim" else theirs.p_sample

    def step(index: int, x: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        epsilon = formula.combined([low.float(), high.float()], [SCALE])
        return kind(x, torch.full((x.shape[0],), index, device=device), epsilon, noise)

    return step


CONTENDERS: dict[str, Callable[[str, torch.device], Step]] = {
    "fastguide": _fastguide,
    "diffusers": _diffusers,
    "guided-diffusion": _guided_diffusion,
    "torch eager": _torch,
}
