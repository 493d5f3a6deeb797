"""DPM-Solver-SDE: the second-order ancestral solver of k-diffusion (Katherine Crowson), over two calls a step.

Its two calls share one path of Brownian motion, so their noise is not independent, and a drop-in's noise sampler gives
both parts. There is no solver of this name in ``fastguide`` itself, whose calls draw independently.
"""

from __future__ import annotations

import math

import torch

from ..schedules.predictions import PredictionType
from ._unscaled_calls import UnscaledCalls, unscaled_table
from .entries import Entry, Form
from .table import StepTable


def dpm_sde_table(calls: UnscaledCalls, prediction_type: PredictionType, s_noise: float) -> StepTable:
    """Return the rows over any calls: at the sigmas where steps begin, and at each one's geometric mean with the next.

    Both calls lead from the step's first sample x, the second with the x_0 of the first one's result:
    ``x' = (down / sigma) * x + (1 - down / sigma) * x_0 + s_noise * up * z``, an ancestral step to the mean and to the
    end. The last step, to sigma 0, is Euler's.
    """
    forms, sigma = [], calls.sigmas.tolist()
    for first in range(0, len(sigma) - 1, 2):
        if first == len(sigma) - 2:
            forms.append(Form(x0=1.0))
            break
        now, middle, after = sigma[first : first + 3]
        ratio, noise = _ancestral(now, middle)
        forms.append(Form(sample=ratio, x0=1 - ratio, noise=s_noise * noise))
        ratio, noise = _ancestral(now, after)
        forms.append(Form(x0=1 - ratio, noise=s_noise * noise).add({first: ratio}))
    nothing = torch.zeros_like(calls.timesteps)
    kept = Entry(nothing, torch.ones_like(nothing))  # the step's first sample
    return unscaled_table("dpm_sde", calls, forms, kept, prediction_type=prediction_type)


def _ancestral(now: float, target: float) -> tuple[float, float]:
    """Return the ratio of sigmas of an ancestral step before its noise, and the noise."""
    up = min(target, math.sqrt(target**2 * (now**2 - target**2) / now**2))
    return math.sqrt(target**2 - up**2) / now, up
