"""RePaint: Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models".

``fastguide`` has no solver of this name; a drop-in has its rows here. Its steps to less noise are those of ``ddim``,
with the known part of the image noised by each step's own noise (eq. 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .table import StepTable


def undoing_rows(betas: Tensor, count: int) -> tuple[StepTable, Tensor]:
    """Return the rows from each timestep's sample to the one that is ``count`` timesteps noisier, and their weights.

    Each of these is ``x' = sqrt(1 - beta) * x + sqrt(beta) * z``, line 10 of algorithm 1 in the paper and a step of the
    forward process (Ho et al. 2020, eq. 2); together they are one sum of x and all z, the predictions here.

    Args:
        betas: of all training timesteps, (timesteps,).
        count: of timesteps, and of predictions.

    Returns:
        The table, whose rows are timesteps, and the weights as guidance has them, (timesteps, 1, count + 1).
    """
    beyond = betas.new_full((count,), torch.nan)
    windows = torch.cat([betas, beyond])[: len(betas) + count - 1].unfold(0, count, 1).double()
    kept = (1 - windows).sqrt()
    after = torch.cat([kept, torch.ones_like(kept[:, :1])], 1).flip(1).cumprod(1).flip(1)  # of each and all behind it
    weights = windows.sqrt() * after[:, 1:]
    table = StepTable.from_columns(
        torch.arange(len(betas), device="cpu"),
        {"out_sample": after[:, 0], "out_pred": torch.ones_like(after[:, 0])},
        undefined="it leads beyond the last timestep",
        name="undoing",
    )
    scale = torch.zeros_like(weights[:, :1])
    return table, torch.cat([weights.sum(1, keepdim=True), weights[:, 1:], scale], 1)[:, None].nan_to_num()
