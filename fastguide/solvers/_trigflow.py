"""Consistency models along a circle, sCM: Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time
Consistency Models".

``fastguide`` has no solver of this name; a drop-in has its rows here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ._columns import NO_VARIANCE, inpainting_columns
from .table import StepTable

_NO_EPSILON = "the model predicts the end of the trajectory, and no epsilon to shift"


def trigflow_table(angles: Tensor, sigma_data: float) -> StepTable:
    """Return the rows between any angles, from each to the next: ``x_0 = cos(t) * x - sin(t) * prediction``.

    Then ``x' = cos(t') * x_0 + sin(t') * sigma_data * z``.
    """
    now, after = angles[:-1], angles[1:]
    one = torch.ones_like(now)
    columns = {
        "x0_scale": one,
        "x0_sample": now.cos(),
        "x0_pred": -now.sin(),
        "out_x0": after.cos(),
        "out_noise": after.sin() * sigma_data,
    }
    return StepTable.from_columns(
        now,
        columns | inpainting_columns(Levels(after.cos(), columns["out_noise"])),
        gradients={"epsilon": _NO_EPSILON, "epsilon_after_clip": _NO_EPSILON, "mean": NO_VARIANCE},
        levels=Levels(now.cos(), now.sin() * sigma_data),
        name="trigflow",
    )
