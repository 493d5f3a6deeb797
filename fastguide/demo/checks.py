"""The demo's measurements of the step itself: its error against the textbook's formula, its time against diffusers'."""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..guidance import ClassifierFree
from ..schedules.noise_schedule import NoiseSchedule
from ..solvers import ddim, ddpm
from ..step.guided_step import guided_step
from .models import Denoiser

_SCALE = 4.0
_STEPS = 50


def accuracy(schedule: NoiseSchedule, denoiser: Denoiser, labels: Tensor, null: Tensor, seed: int) -> dict[str, float]:
    """Relative error of a whole DDIM loop with classifier-free guidance, against the textbook in float64.

    The truth is the loop written out, everything in float64, the model too. Then the model runs in float32, or its
    output is rounded to bfloat16 as a large model's is; fastguide keeps its state in float32, and diffusers, if it is
    installed, in the dtype of the model's output.
    """
    x_T = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    table = ddim(schedule, _STEPS)
    exact = copy.deepcopy(denoiser).double()

    def predict(x: Tensor, t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = exact if dtype == torch.float64 else denoiser
        timestep = torch.full((2 * len(labels),), t)
        x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        uncond, cond = model(torch.cat([x, x]), timestep, torch.cat([null, labels])).to(dtype).chunk(2)
        return uncond, cond

    def textbook(x: Tensor, t: int, t_prev: int | None, uncond: Tensor, cond: Tensor) -> Tensor:
        a = schedule.alphas_cumprod[t].item()
        a_prev = 1.0 if t_prev is None else schedule.alphas_cumprod[t_prev].item()
        epsilon = uncond + _SCALE * (cond - uncond)
        x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * epsilon

    timesteps = table.timesteps.tolist()
    with torch.no_grad():
        truth = x_T.double()
        for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
            truth = textbook(truth, t, t_prev, *predict(truth, t, torch.float64))
        errors = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            x = x_T
            for i, t in enumerate(timesteps):
                x = guided_step(table, i, x, predict(x, t, dtype), ClassifierFree(_SCALE))
            errors[f"fastguide, {name} model output"] = _relative_error(x, truth)
            if _has_diffusers():
                theirs, x = _diffusers_scheduler("DDIMScheduler", schedule, _STEPS), x_T.to(dtype)
                for t in timesteps:
                    uncond, cond = predict(x, t, dtype)
                    x = theirs.step(uncond + _SCALE * (cond - uncond), t, x).prev_sample
                errors[f"diffusers, {name} model output"] = _relative_error(x, truth)
    return errors


def speed(schedule: NoiseSchedule) -> dict[str, dict[str, float]]:
    """Microseconds of a guided step, fastguide's and diffusers' with its guidance, measured in turns."""
    return {
        f"{solver} {shape}": _medians(_step_calls(schedule, solver, shape))
        for solver in ("ddim", "ddpm")
        for shape in ((1, 4, 64, 64), (16, 4, 64, 64))
    }


def _step_calls(schedule: NoiseSchedule, solver: str, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """One guided step of each library, on the same inputs; noise, where the solver adds it, from the same stream."""
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
    """Median time of each call in microseconds; in turns, so that all see the same machine."""
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
