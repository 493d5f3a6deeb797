"""A guided step in plain torch without synchronisation, as a careful user writes it: what torch.compile fuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .workloads import COMPOSED_SCALES, GRADIENT_SCALE


def combined(predictions: Sequence[Tensor], scales: Sequence[float] = COMPOSED_SCALES) -> Tensor:
    """m = m_0 + sum_k s_k (m_k - m_0); classifier-free guidance with one condition (Ho and Salimans 2022, eq. 6)."""
    guided = predictions[0]
    for scale, prediction in zip(scales, predictions[1:], strict=False):
        guided = guided + scale * (prediction - predictions[0])
    return guided


def guided_step(
    has: dict[str, float],
    row: dict[str, Any],
    sample: Tensor,
    predictions: Sequence[Tensor],
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The terms whose coefficients ``has`` says are not 0 (or 1), with ``row``'s; in float32, or the sample's float64.

    ``has`` are numbers, ``row`` numbers or tensors, by the names of a step table's columns.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    terms: list[Tensor] = []

    def add(column: str, values: Tensor) -> None:
        if has[column] != 0:
            terms.append(values if has[column] == 1 else row[column] * values)

    def total() -> Tensor:
        result = terms[0]
        for term in terms[1:]:
            result = result + term
        terms.clear()
        return result

    x = sample.to(dtype)
    g = None if gradient is None else GRADIENT_SCALE * gradient.to(dtype)
    m = combined([prediction.to(dtype) for prediction in predictions]) if predictions else None
    if m is not None:
        add("x0_sample", x)
        add("x0_pred", m)
        if g is not None:
            add("x0_grad", g)
        x0 = row["x0_scale"] * total()
        if has["clip"] < float("inf"):
            x0 = x0.clamp(-has["clip"], has["clip"])
        add("out_x0", x0)
        add("out_pred", m)
    add("out_sample", x)
    log_variance = None
    if variance is not None:
        log_variance = row["logvar_base"] + row["logvar_span"] * variance.to(dtype)
    if g is not None:
        add("out_grad", g)
        if log_variance is not None:
            add("out_var_grad", torch.exp(log_variance) * g)
    if noise is not None:
        z = noise.to(dtype)
        add("out_noise", z if log_variance is None else torch.exp(0.5 * log_variance) * z)
    return total()
