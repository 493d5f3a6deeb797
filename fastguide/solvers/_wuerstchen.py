"""Wuerstchen's DDPM: Pernias et al. 2023, over a cosine schedule of real timesteps from 1 to 0.

``fastguide`` has no solver of this name; a drop-in has its rows here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.predictions import original_from
from ._columns import NO_VARIANCE, inpainting_columns
from .table import StepTable


def wuerstchen_table(timesteps: Tensor, abar: Tensor) -> StepTable:
    """Return the rows from each timestep to the next one, with abar at each.

    ``x' = (x - (1 - alpha) * epsilon / sqrt(1 - abar)) / sqrt(alpha) + sqrt(variance) * z``, with ``alpha = abar /
    abar'`` (Ho et al. 2020, algorithm 2); no noise leads to timestep 0.
    """
    a, a_next = abar[:-1], abar[1:]
    alpha = a / a_next
    levels = Levels.from_alphas_cumprod(a)
    columns = {
        **original_from("epsilon", levels).columns(),
        "out_sample": alpha.rsqrt(),
        "out_pred": -(1 - alpha) / (1 - a).sqrt() * alpha.rsqrt(),
        "out_noise": ((1 - alpha) * (1 - a_next) / (1 - a)).sqrt() * (timesteps[1:] != 0),
    }
    return StepTable.from_columns(
        timesteps[:-1],
        columns | inpainting_columns(Levels.from_alphas_cumprod(torch.cat([a_next[:-1], a_next.new_ones(1)]))),
        gradients=dict.fromkeys(("epsilon", "epsilon_after_clip", "mean"), NO_VARIANCE),
        levels=levels,
        name="wuerstchen",
    )
