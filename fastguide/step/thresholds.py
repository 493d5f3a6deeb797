"""Divide x_0 by a threshold: dynamic thresholding (Saharia et al. 2022, section 2.3), of a table's ``quantile``.

A sample's threshold is the quantile of the magnitudes of its x_0, limited to [1, top]; x_0 is divided by it, and then
limited to [-1, 1]. The native backend finds it in its step; for the others, it is found here, by sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance.moment_weights import MomentWeights
from ..solvers.table import ROW_COLUMNS
from .backends.registry import Backend
from .operator import THRESHOLD_WORDS, StepArguments
from .original import combined, per_sample, unclipped
from .weigh import made_in_step, position_of, selected, split

_CLIP, _QUANTILE = ROW_COLUMNS.index("clip"), ROW_COLUMNS.index("quantile")


def thresholds_for(sample: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a step's memory for its inverse thresholds: (batch, 1), or (batch, ``THRESHOLD_WORDS``) on a GPU."""
    batch = sample.shape[0]
    if sample.device.type == "cpu":
        return torch.empty(batch, 1, dtype=dtype, device="cpu")
    return torch.zeros(batch, THRESHOLD_WORDS, dtype=dtype, device=sample.device)


def makes_weights_in_step(backend: Backend, made_by: MomentWeights, sample: Tensor, thresholds: bool) -> bool:
    """Tell whether a step makes these weights itself: not if its thresholds, of the guided x_0, are found before it."""
    found_before = thresholds and backend.needs_thresholds
    return not found_before and made_in_step(backend, made_by, sample)


def with_thresholds(backend: Backend, a: StepArguments) -> StepArguments:
    """Return the arguments of a step with its thresholds found, if the backend's kernel does not find them.

    Args:
        backend: whose step it is.
        a: the step's arguments; its weights are those that it takes, its inverse thresholds None or memory for them.
    """
    if a.inverse_thresholds is None or not backend.needs_thresholds:
        return a
    inverse = thresholds_of(a, _unclipped_original(a)).reciprocal()
    return a._replace(inverse_thresholds=inverse[:, None])


def thresholds_of(a: StepArguments, original: Tensor) -> Tensor:
    """Return each sample's threshold, of shape (batch,); 1 in a row that has no quantile.

    Args:
        a: the step's arguments.
        original: x_0 before it is clipped, in the dtype of the rows.
    """
    batch = a.sample.shape[0]
    steps, _, _ = position_of(a)
    rows = a.rows.index_select(0, steps.clamp(max=len(a.rows) - 1)).expand(batch, -1)  # a kernel sees to what is beyond
    quantiles, tops = rows[:, _QUANTILE], rows[:, _CLIP]
    if original.numel() == 0:
        return torch.ones_like(tops)
    ordered = original.abs().flatten(1).sort(1).values  # torch.quantile takes 16 million elements at most
    last = ordered.shape[1] - 1
    place = quantiles * last
    lower = place.floor()
    below, above = (ordered.gather(1, at.long().clamp(max=last)[:, None])[:, 0] for at in (lower, place.ceil()))
    found = below.lerp(above, place - lower)
    found = torch.where((place > lower) & above.isinf(), tops, torch.where(place > lower, found, below))
    found = torch.where(ordered[:, -1].isnan(), torch.nan, found)
    return torch.where(quantiles > 0, torch.minimum(found.clamp(min=1), tops), 1.0)


def _unclipped_original(a: StepArguments) -> Tensor:
    batch, dtype = a.sample.shape[0], a.rows.dtype
    steps, _, _ = position_of(a)
    columns = a.rows.index_select(0, steps.clamp(max=len(a.rows) - 1)).unbind(1)
    row = {name: per_sample(values, a.sample) for name, values in zip(ROW_COLUMNS, columns, strict=True)}
    count = a.weights.shape[-1] - 1
    each, x = [prediction.to(dtype) for prediction in split(a.predictions, count, batch)], a.sample.to(dtype)
    weight = [per_sample(w, x) for w in selected(a.weights, steps, batch).unbind(-1)]
    return unclipped(row, x, combined(weight, each, x), a.gradient, weight[count])
