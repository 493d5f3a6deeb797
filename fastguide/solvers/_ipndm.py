"""Improved PNDM: Zhang and Chen 2022, who begin PNDM (Liu et al. 2022, eq. 9, 12 and 13) with lower orders.

The schedule is a quarter of a circle, ``x = alpha * x_0 + beta * epsilon`` with ``alpha^2 + beta^2 = 1``, which begins
without signal, and the model predicts the velocity. It is diffusers' alone, so that ``fastguide`` has no solver of this
name; a drop-in has its rows here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ._columns import NO_VARIANCE
from .entries import GOES_ON, Entry, Form, history_columns
from .pndm import ADAMS_BASHFORTH
from .table import StepTable

_SMALLEST = 1e-8
"""The least signal that is divided by."""


def ipndm_table(alpha: Tensor, beta: Tensor, timesteps: Tensor) -> StepTable:
    """Return the rows between any levels, one more than timesteps.

    The entry, and the row's x_0, is epsilon, ``beta * x + alpha * m``, and a step takes the last four in the
    proportions of Adams and Bashforth.
    """
    forms, kept = [], list[int]()
    ratios, epsilons = [], []
    for call in range(len(timesteps)):
        ratio = float(alpha[call + 1]) / max(float(alpha[call]), _SMALLEST)
        ratios.append(ratio)
        epsilons.append(float(beta[call + 1]) - ratio * float(beta[call]))
        kept = [call, *kept][:4]
        weights = dict(zip(kept, ADAMS_BASHFORTH[len(kept) - 1], strict=True))
        forms.append(Form(sample=ratio).add(weights, epsilons[-1]))
    here = Levels(alpha[:-1], beta[:-1])
    one, zero = torch.ones_like(here.alpha), torch.zeros_like(here.alpha)
    first, a, b = forms[0], float(alpha[0]), float(beta[0])
    # in closed form: without signal, the ratio is without bound, and x and epsilon are the same
    first.entries.clear()
    first.sample = ratios[0] * (1 - b * b) + float(beta[1]) * b
    columns = {"x0_scale": one, "x0_sample": here.sigma, "x0_pred": here.alpha}
    columns |= history_columns(forms, Entry(one, zero))
    columns["out_pred"] = zero.clone()
    columns["out_pred"][0] = epsilons[0] * a
    return StepTable.from_columns(
        timesteps,
        columns,
        gradients={"epsilon": GOES_ON, "epsilon_after_clip": GOES_ON, "mean": NO_VARIANCE},
        levels=here,
        name="ipndm",
    )
