"""A guided step in plain torch without synchronisation, as a careful user writes it: what torch.compile fuses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import fastguide


def formula_of(noisy: bool) -> Callable[..., Tensor]:
    """``formula(row, scale, x, uncond, cond, noise)``, coefficients in one tensor; ``noise`` is used if noisy."""
    column = {name: i for i, name in enumerate(fastguide.ROW_COLUMNS)}

    def formula(row: Tensor, scale: Tensor, x: Tensor, uncond: Tensor, cond: Tensor, noise: Tensor | None) -> Tensor:
        uncond, cond = uncond.float(), cond.float()
        m = uncond + scale * (cond - uncond)
        x0 = row[column["x0_scale"]] * (row[column["x0_sample"]] * x + row[column["x0_pred"]] * m)
        result = row[column["out_x0"]] * x0 + row[column["out_sample"]] * x + row[column["out_pred"]] * m
        return result + row[column["out_noise"]] * noise if noisy else result

    return formula
