"""Measure the step itself: the error of a loop against float64, and the time of a step beside diffusers'."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..guidance import ClassifierFree
from ..schedules import NoiseSchedule
from ..solvers import ddim, ddpm
from ..step.guided_step import guided_step
from .models import Denoiser

_SCALE = 4.0
_STEPS = 50


def accuracy(schedule: NoiseSchedule, denoiser: Denoiser, labels: Tensor, null: Tensor, seed: int) -> dict[str, float]:
    """Return the relative errors of a DDIM loop with classifier-free guidance, against the loop in float64.

    The truth is the reference backend with model and sample in float64; the package's tests compare that backend with
    the papers' formulas. Then the model's output is in float32, or rounded to bfloat16 as a large model's is.
    fastguide's sample is in float32; diffusers', if it is installed, in the dtype of the model's output.

    Args:
        schedule: the noise schedule of the model.
        denoiser: the model.
        labels: what to sample, shape (n,).
        null: the label of no condition, shape (n,).
        seed: of the starting noise.
    """
    x_T = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    table, guidance = ddim(schedule, _STEPS), ClassifierFree(_SCALE)
    exact = copy.deepcopy(denoiser).double()

    def predict(x: Tensor, t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model, x = (exact, x) if dtype == torch.float64 else (denoiser, x.float())
        timestep = torch.full((2 * len(labels),), t)
        uncond, cond = model(torch.cat([x, x]), timestep, torch.cat([null, labels])).to(dtype).chunk(2)
        return uncond, cond

    timesteps = table.timesteps.tolist()
    with torch.no_grad():
        truth = x_T.double()
        for i, t in enumerate(timesteps):
            truth = guided_step(table, i, truth, predict(truth, t, torch.float64), guidance, backend="reference")
        errors = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            x = x_T
            for i, t in enumerate(timesteps):
                x = guided_step(table, i, x, predict(x, t, dtype), guidance)
            errors[f"fastguide, {name} model output"] = _relative_error(x, truth)
            if _has_diffusers():
                theirs, x = _diffusers_scheduler("DDIMScheduler", schedule, _STEPS), x_T.to(dtype)
                for t in timesteps:
                    uncond, cond = predict(x, t, dtype)
                    x = theirs.step(uncond + _SCALE * (cond - uncond), t, x).prev_sample
                errors[f"diffusers, {name} model output"] = _relative_error(x, truth)
    return errors


def speed(schedule: NoiseSchedule) -> dict[str, dict[str, float]]:
    """Return the microseconds of a guided step of fastguide and of diffusers with its guidance, timed in turns."""
    return {
        f"{solver} {shape}": _medians(_step_calls(schedule, solver, shape))
        for solver in ("ddim", "ddpm")
        for shape in ((1, 4, 64, 64), (16, 4, 64, 64))
    }


def _step_calls(schedule: NoiseSchedule, solver: str, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Return a guided step of each library, on the same inputs and with the same generator."""
    generator = torch.Generator().manual_seed(0)
    x, uncond, cond = torch.randn(3, *shape, generator=generator)
    table = ddim(schedule, _STEPS) if solver == "ddim" else ddpm(schedule, _STEPS)
    guidance = ClassifierFree(_SCALE)

    def ours() -> object:
        return guided_step(table, 20, x, [uncond, cond], guidance, generator=generator)

    if not _has_diffusers():
        return {"fastguide": ours}
    scheduler = _diffusers_scheduler({"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[solver], schedule, _STEPS)
    timestep = scheduler.timesteps[20]

    def theirs() -> object:
        return scheduler.step(uncond + _SCALE * (cond - uncond), timestep, x, generator=generator)

    return {"fastguide": ours, "diffusers": theirs}


def _medians(calls: dict[str, Callable[[], object]], rounds: int = 300) -> dict[str, float]:
    """Return the median microseconds of each call, timed in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 20):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_number >= 20:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def _has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def _diffusers_scheduler(name: str, schedule: NoiseSchedule, steps: int) -> Any:
    import diffusers

    betas = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    scheduler = getattr(diffusers, name)(trained_betas=betas.float().numpy(), clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def _relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())
