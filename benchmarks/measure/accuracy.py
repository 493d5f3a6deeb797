"""Run whole loops against float64: the error after 50 steps for each dtype of the model's output, and a step's time."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastguide import ClassifierFree, ddim, ddpm, guided_step, portable_noise
from tests.support import textbook

from ..contenders.plain_torch import coefficients, guided, straight_lines
from ..contenders.registry import is_ours
from ..contenders.the_field import GuidedDiffusion, scheduler
from ..workloads import GUIDANCE_SCALE, SCHEDULE, STEP, NotRunError, abar_at
from .caches import cold_caches
from .timing import describe, in_turns

STEPS, SHAPE = 50, (1, 4, 64, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Row = dict[str, Any]
Step: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Returns the next sample from (step index, sample, unconditional and conditional prediction, noise)."""


@torch.no_grad()
def measure(device: torch.device, seconds: float = 0.3) -> Iterator[Row]:
    """Yield a row for each solver, dtype and contender: the loop's relative error, and the seconds of one step."""
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    for solver in ("ddim", "ddpm"):
        truth = _loop(_textbook(solver), x_T.double(), torch.float64)
        for dtype in DTYPES:
            yield from _contenders(solver, dtype, x_T, truth, seconds)


def _contenders(solver: str, dtype: torch.dtype, x_T: Tensor, truth: Tensor, seconds: float) -> Iterator[Row]:
    rows: dict[str, Row] = {}
    calls = {}
    for name, make in CONTENDERS.items():
        row: Row = {"suite": "accuracy", "solver": solver, "dtype": str(dtype)[6:], "contender": name}
        # diffusers' pipelines keep the sample in the model's dtype, the others in float32
        x = x_T.to(dtype) if name == "diffusers" else x_T
        try:
            step = make(solver, x_T.device)
            error = float((_loop(step, x, dtype).double() - truth).norm() / truth.norm())
        except NotRunError as reason:
            yield row | {"status": "not run", "reason": str(reason)}
            continue
        except Exception as failure:  # reported in its row; the others are still measured
            yield row | _failed(name, failure)
            continue
        rows[name] = row | {"status": "ok", "error": error}
        uncond, cond = (x_T.flip(dim).to(dtype) for dim in (2, 3))
        noise = _noise(STEP, x_T.device).to(x.dtype)
        calls[name] = lambda step=step, x=x, uncond=uncond, cond=cond, z=noise: step(STEP, x, uncond, cond, z)
    timed = in_turns(calls, seconds, x_T.device, before=cold_caches(5 * x_T.nbytes, x_T.nbytes))
    for name, row in rows.items():
        if name in timed.failures:
            yield row | _failed(name, timed.failures[name])
        else:
            yield row | {"seconds": timed.times[name].median}


def _failed(contender: str, error: Exception) -> Row:
    return {"status": "failed" if is_ours(contender) else "not run", "reason": describe(error)}


def _loop(step: Step, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the guided loop with predictions that are rounded to a dtype."""
    timesteps = SCHEDULE.timesteps(STEPS).tolist()
    for index, timestep in enumerate(timesteps):
        uncond, cond = (_prediction(x, timestep, mean).to(dtype) for mean in (0.0, 1.0))
        x = step(index, x, uncond, cond, _noise(index, x.device).to(x.dtype))
    return x


def _prediction(x: Tensor, timestep: int, mean: float) -> Tensor:
    """Return the exact noise prediction, in float64, for normal images of this mean and standard deviation 0.5."""
    a = SCHEDULE.alphas_cumprod[timestep].to(x.device)
    return (1 - a).sqrt() * (x.double() - a.sqrt() * mean) / (a * 0.25 + 1 - a)


@functools.lru_cache(STEPS)
def _noise(step: int, device: torch.device) -> Tensor:
    return portable_noise(range(SHAPE[0]), SHAPE, step=step, device=device)


def _textbook(solver: str) -> Step:
    """Return the truth: the papers' formulas."""

    def step(index: int, x: Tensor, uncond: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        a, a_prev = abar_at(STEPS, index)
        m = textbook.guided_prediction([uncond, cond], [GUIDANCE_SCALE])
        if solver == "ddim":
            return textbook.ddim_step(x, m, a, a_prev)
        return textbook.ddpm_step(x, m, a, a_prev, last=index == STEPS - 1, z=noise)

    return step


def _fastguide(solver: str, device: torch.device) -> Step:
    """Return fastguide's step: the sample in float32, the model's outputs in their dtype."""
    table = (ddim if solver == "ddim" else ddpm)(SCHEDULE, STEPS).to(device)
    guidance = ClassifierFree(GUIDANCE_SCALE)
    if solver == "ddim":
        return lambda index, x, uncond, cond, noise: guided_step(table, index, x, [uncond, cond], guidance)
    return lambda index, x, uncond, cond, noise: guided_step(table, index, x, [uncond, cond], guidance, noise=noise)


def _torch(solver: str, device: torch.device) -> Step:
    """Return the step in plain torch: the sample and all arithmetic in float32."""
    noisy = [solver == "ddpm" and index < STEPS - 1 for index in range(STEPS)]
    rows = [coefficients(*abar_at(STEPS, index)) for index in range(STEPS)]
    steps = [straight_lines(solver, 2, ["noise"] * n, numbers=row) for n, row in zip(noisy, rows, strict=True)]

    def step(index: int, x: Tensor, uncond: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        return steps[index](x, uncond, cond, *([noise] if noisy[index] else []))

    return step


def _diffusers(solver: str, device: torch.device) -> Step:
    """Return diffusers' step, as in a pipeline; the given noise replaces its own, in the dtype that it draws."""
    theirs = scheduler(solver, STEPS, device)
    module: Any = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    randn_tensor = module.randn_tensor

    def step(index: int, x: Tensor, uncond: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        output = uncond + GUIDANCE_SCALE * (cond - uncond)
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
            module.randn_tensor = randn_tensor
        return result

    return step


def _guided_diffusion(solver: str, device: torch.device) -> Step:
    """Return guided-diffusion's step: the sample is in float32 for every dtype of the model."""
    theirs = GuidedDiffusion(SCHEDULE.alphas_cumprod[SCHEDULE.timesteps(STEPS)], device)
    sample = theirs.ddim_sample if solver == "ddim" else theirs.p_sample

    def step(index: int, x: Tensor, uncond: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        epsilon = guided([uncond.float(), cond.float()], [GUIDANCE_SCALE])
        return sample(x, torch.full((x.shape[0],), index, device=device), epsilon, noise)

    return step


CONTENDERS: dict[str, Callable[[str, torch.device], Step]] = {
    "fastguide": _fastguide,
    "diffusers": _diffusers,
    "guided-diffusion": _guided_diffusion,
    "torch eager": _torch,
}
