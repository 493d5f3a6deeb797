"""Whole loops against float64: how far each is off after 50 steps, by the dtype of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..guidance import ClassifierFree
from ..noise import portable_noise
from ..sampler import Sampler
from ..schedule import NoiseSchedule
from ..solvers import ddim, ddpm

STEPS, SCALE, SHAPE = 50, 7.5, (2, 4, 32, 32)
SCHEDULE = NoiseSchedule.scaled_linear()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each solver, dtype and contender."""
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    for solver in ("ddim", "ddpm"):
        truth = _float64(solver, x_T)
        for dtype in DTYPES:
            for name, run in (("fastguide", _ours), ("diffusers", _theirs)):
                row = {"suite": "accuracy", "solver": solver, "dtype": str(dtype)[6:], "contender": name}
                try:
                    got = run(solver, x_T, dtype)
                except ImportError:
                    yield row | {"status": "not run", "reason": "diffusers is not installed"}
                    continue
                yield row | {"status": "ok", "error": float((got.double() - truth).norm() / truth.norm())}


def _model(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The exact noise prediction of a Gaussian for each condition, computed in float64 and rounded as a model's is."""
    abar = SCHEDULE.alphas_cumprod

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = abar.to(x.device)[t].reshape(-1, 1, 1, 1)
        mean = y.double().reshape(-1, 1, 1, 1)
        epsilon = (1 - a).sqrt() * (x.double() - a.sqrt() * mean) / (a * 0.25 + 1 - a)
        return epsilon.to(dtype)

    return model


def _table(solver: str) -> Any:
    return ddim(SCHEDULE, STEPS) if solver == "ddim" else ddpm(SCHEDULE, STEPS)


def _noise(step: int, device: torch.device) -> Tensor:
    return portable_noise(range(SHAPE[0]), SHAPE, step=step, device=device)


def _float64(solver: str, x_T: Tensor) -> Tensor:
    table, model, x = _table(solver), _model(torch.float64), x_T.double()
    cond, uncond = torch.ones(SHAPE[0], device=x.device), torch.zeros(SHAPE[0], device=x.device)
    rows = table.coefficients()
    for step, timestep in enumerate(table.host_timesteps):
        t = torch.full((SHAPE[0],), timestep, device=x.device)
        low = model(x, t, uncond)
        m = low + SCALE * (model(x, t, cond) - low)
        row = {name: float(values[step]) for name, values in rows.items()}
        x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
        x = row["out_x0"] * x0 + row["out_sample"] * x + row["out_pred"] * m
        x = x + row["out_noise"] * _noise(step, x.device).double()
    return x


def _ours(solver: str, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """The state in float32, the model in its dtype."""
    sampler = Sampler(_model(dtype), _table(solver).to(x_T.device), ClassifierFree(SCALE))
    ones = torch.ones(SHAPE[0], device=x_T.device)
    return sampler(x_T, cond=ones, uncond=0 * ones, seeds=list(range(SHAPE[0])))


def _theirs(solver: str, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """As a pipeline in the model's dtype: latents, guidance and scheduler."""
    import diffusers as installed

    diffusers: Any = installed
    abar = SCHEDULE.alphas_cumprod
    betas = (1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])).float().numpy()
    kind = diffusers.DDIMScheduler if solver == "ddim" else diffusers.DDPMScheduler
    scheduler = kind(trained_betas=betas, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    model, x = _model(dtype), x_T.to(dtype)
    ones = torch.ones(SHAPE[0], device=x.device)
    for step, timestep in enumerate(scheduler.timesteps):
        t = torch.full((SHAPE[0],), int(timestep), device=x.device)
        low = model(x, t, 0 * ones)
        prediction = low + SCALE * (model(x, t, ones) - low)
        if solver == "ddim":
            x = scheduler.step(prediction, timestep, x).prev_sample
            continue
        # the same noise for both: its own is added where it draws it
        mean = scheduler.step(prediction, timestep, x, generator=torch.Generator().manual_seed(0)).prev_sample
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype).to(x.device)
        deviation = float(_table(solver).coefficients()["out_noise"][step])
        x = (mean - deviation * drawn + deviation * _noise(step, x.device).to(dtype)).to(dtype)
    return x
