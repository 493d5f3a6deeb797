"""Add up the moments of a sample's predictions: inner products and sums of the terms that vectors are made of.

The terms are the first prediction, the differences of the others to it, as the step reads them, and the sample, where
it has a weight too. A difference of predictions is exact in float32 where they nearly agree; from moments of the
predictions themselves it would come out as the difference of three nearly equal numbers, and lose up to three digits of
it. Groups are short, their vectors may nearly cancel, and what is left of them is divided by: theirs are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .encoded import PART


def moments_of(
    predictions: Sequence[Tensor],
    names: Collection[str],
    sample: Tensor | None = None,
    dims: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Return moments of each sample, in float64, shape (batch,); or of each group, 1 in the dimensions that it spans.

    Parts begin with the sample: on the host, what it has does not depend on the others of its batch, to the bit.

    Args:
        predictions: each of shape (batch, ...).
        names: those that are wanted: ``dot_i_j`` of two terms, ``sum_i`` of one, ``numel``. Others are left out.
        sample: the term behind those of the predictions.
        dims: the dimensions that a group spans, counted from the first one.
    """
    first = predictions[0]
    given = predictions if sample is None else (*predictions, sample)
    wide = dims is not None or any(each.dtype == torch.float64 for each in given)
    exact = torch.float64 if wide else torch.float32
    base = first.to(exact)
    terms: dict[int, Tensor] = {0: base}
    wanted = {name: [int(part) for part in name.split("_")[1:]] for name in names if name[:4] in ("dot_", "sum_")}
    for number in sorted({number for numbers in wanted.values() for number in numbers} - {0}):
        if number < len(predictions):
            terms[number] = predictions[number].to(exact) - base
        else:
            assert sample is not None
            terms[number] = sample.to(exact)
    made = {
        name: _added(terms[numbers[0]] if len(numbers) == 1 else terms[numbers[0]] * terms[numbers[1]], dims)
        for name, numbers in wanted.items()
    }
    if "numel" in names:
        spanned = first.shape[1:] if dims is None else [first.shape[k] for k in dims]
        shape = (1,) if dims is None else (1,) * first.dim()
        made["numel"] = torch.full(shape, float(math.prod(spanned)), dtype=torch.float64, device=first.device)
    return made


def _added(values: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Return the sum of each sample, or of each group, in float64."""
    if dims is not None:
        return values.sum(dims, keepdim=True, dtype=torch.float64)
    values = values.flatten(1)
    whole = values.shape[1] // PART * PART
    parts = values[:, :whole].unflatten(1, (-1, PART)).sum(-1) if whole else values[:, :0]
    return parts.double().sum(1) + values[:, whole:].sum(1).double()
