"""The sampler of variance-exploding models: Song et al. 2021, "Score-Based Generative Modeling through SDEs".

``fastguide`` has no solver of this name; a drop-in has its rows here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .table import StepTable


def score_rows(sigmas: Tensor) -> StepTable:
    """Return the rows from each sigma to the one before it in a rising table, and from the first to 0.

    The model predicts a score. With ``v = sigma^2 - sigma'^2``, ``x' = x + v * score + sqrt(v) * z``, its ancestral
    sampling (eq. 47). What is x_0 to a row is the mean here, x' without its noise.
    """
    variance = sigmas.square() - torch.cat([sigmas.new_zeros(1), sigmas[:-1]]).square()
    one = torch.ones_like(variance)
    columns = {
        "x0_scale": one,
        "x0_sample": one,
        "x0_pred": variance,
        "out_x0": one,
        "out_noise": variance.clamp(min=0).sqrt(),
    }
    return StepTable.from_columns(torch.arange(len(sigmas), device="cpu"), columns, name="score_sde_ve")
