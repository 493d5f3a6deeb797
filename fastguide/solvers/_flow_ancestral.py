"""Ancestral sampling of a flow: Euler's method to a lower sigma, and noise up to the next one.

``fastguide`` has no solver of this name; a drop-in has its rows here.
"""

from __future__ import annotations

import torch

from ..schedules.flow import FlowSteps
from ..schedules.levels import Levels
from ..schedules.predictions import original_from
from ._columns import NO_VARIANCE, gradient_forms, inpainting_columns, x0_shift
from .table import StepTable

_CLEAN = 1e-8
_SMALL = 1e-12


def flow_ancestral_table(steps: FlowSteps, eta: float, s_noise: float) -> StepTable:
    """Return the rows over any sigmas, as ComfyUI's ``sample_euler_ancestral_RF`` steps them.

    ``sigma_down = sigma' * (1 + (sigma' / sigma - 1) * eta)``, and with ``r = sigma_down / sigma`` Euler's step leads
    to ``y = r * x + (1 - r) * x_0``. With ``a = (1 - sigma') / (1 - sigma_down)``, which makes the signal that of
    sigma', ``x' = a * y + s_noise * sqrt(sigma'^2 - (a * sigma_down)^2) * z``. A step to 0 is x_0; without noise,
    ``x' = y``.
    """
    now, after = steps.sigmas[:-1], steps.sigmas[1:]
    levels = Levels.flow_matching(now)
    clean = after.abs() < _CLEAN
    down = torch.where(clean, 0.0, after * (1 + (after / now - 1) * eta))
    r = down / now
    a, noise = torch.ones_like(now), torch.zeros_like(now)
    if eta > 0 and s_noise > 0:
        signal = 1 - down
        a = torch.where(clean, 1.0, (1 - after) / (signal + _SMALL))
        variance = after.square() - (down * (1 - after)).square() / (signal.square() + _SMALL)
        noise = torch.where(clean, 0.0, s_noise * variance.clamp(min=0).sqrt())
    columns = original_from("flow_prediction", levels).columns()
    columns |= {"out_sample": a * r, "out_x0": a * (1 - r), "out_noise": noise}
    added = noise.square() if bool((noise > 0).any()) else NO_VARIANCE
    return StepTable.from_columns(
        steps.timesteps,
        columns | inpainting_columns(Levels.flow_matching(after)),
        gradients=gradient_forms(columns, x0_shift(levels), torch.zeros_like(now), steps.timesteps, added),
        levels=levels,
        name="flow_ancestral",
    )
