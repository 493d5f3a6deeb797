"""Predict the original sample in plain torch, up to its clip: for the reference, and the search for thresholds."""

from __future__ import annotations

import torch
from torch import Tensor


def unclipped(row: dict[str, Tensor], x: Tensor, m: Tensor, gradient: Tensor | None, scale: Tensor) -> Tensor:
    """Return x_0 before it is clipped, of the sample, the guided prediction, and a gradient with its scale."""
    x0 = row["x0_sample"] * x + row["x0_pred"] * m
    if gradient is not None:
        x0 = x0 + row["x0_grad"] * scale * gradient.to(x.dtype)
    return row["x0_scale"] * x0


def combined(weight: list[Tensor], p: list[Tensor], x: Tensor) -> Tensor:
    """Return m = sum_k w_k p_k + w_x x, anchored at p_0: weight[0] is the sum of all w_k, the last one may be w_x."""
    m = weight[0] * p[0] if p else torch.zeros_like(x)
    for k in range(1, len(p)):
        m = m + weight[k] * (p[k] - p[0])
    return m + weight[-1] * x if p and len(weight) > len(p) + 1 else m


def per_sample(values: Tensor, sample: Tensor) -> Tensor:
    """Return values, one for all or one a sample, in a shape that goes with the sample's."""
    return values.reshape(-1, *[1] * (sample.dim() - 1))
