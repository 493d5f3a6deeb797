"""Add up the moments of a sample's predictions: inner products and sums of the terms that vectors are made of.

The terms are the first prediction, the differences of the others to it, as the step reads them, and the sample, where
it has a weight too. A difference of predictions is exact in float32 where they nearly agree; from moments of the
predictions themselves it would come out as the difference of three nearly equal numbers, and lose up to three digits of
it. Groups are short, their vectors may nearly cancel, and what is left of them is divided by: theirs are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .encoded import PART

_LEAST_SPREAD, _LEAST_SPREAD_OF_MANY = 1 / 4, 1 / 64  # of two terms, and of more
_LEAST_SQUARE = 1e-25  # of the first prediction


def moments_of(
    predictions: Sequence[Tensor],
    names: Collection[str],
    sample: Tensor | None = None,
    dims: tuple[int, ...] | None = None,
    exactly: bool = False,
) -> dict[str, Tensor]:
    """Return moments of each sample, in float64, shape (batch,); or of each group, 1 in the dimensions that it spans.

    Parts begin with the sample: on the host, what it has does not depend on the others of its batch, to the bit.

    Args:
        predictions: each of shape (batch, ...).
        names: those that are wanted: ``dot_i_j`` of two terms, ``sum_i`` of one, ``numel``. Others are left out.
        sample: the term behind those of the predictions.
        dims: the dimensions that a group spans, counted from the first one.
        exactly: add up samples in float64 as well, which is right however large a mean is beside the deviation from it.
    """
    first = predictions[0]
    given = predictions if sample is None else (*predictions, sample)
    wide = exactly or dims is not None or any(each.dtype == torch.float64 for each in given)
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


def are_spread(moments: Mapping[str, Tensor]) -> Tensor:
    """Return whether float32 has left digits of each sample's moments: whether its vectors point in ways of their own.

    The moments are on the host. The rule is that of ``csrc/kernels/cpu/spread.h``, of shape (batch,): it takes the
    determinant of the cosines of terms and of a vector of ones. Products that are not among the moments count as 0, and
    so do zeros. What has overflowed is not spread, nor is a first prediction whose squares are too small for float32.
    """
    numbers = {name: tuple(int(part) for part in name.split("_")[1:]) for name in moments if name != "numel"}
    terms = 1 + max((max(each) for each in numbers.values()), default=0)
    batch = next((len(moments[name]) for name in numbers), 1)
    gram = torch.zeros(batch, terms + 1, terms + 1, dtype=torch.float64)
    for name, each in numbers.items():
        i, j = each if len(each) == 2 else (each[0], terms)
        gram[:, i, j] = gram[:, j, i] = moments[name]
    gram[:, terms, terms] = moments.get("numel", 0.0)
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = torch.where(lengths > 0, lengths, torch.inf)
    cosines = gram / (lengths[:, :, None] * lengths[:, None, :])
    cosines.diagonal(dim1=1, dim2=2).fill_(1.0)
    least = _LEAST_SPREAD if terms == 2 else _LEAST_SPREAD_OF_MANY
    spread: Tensor = torch.linalg.det(cosines)
    large = moments["dot_0_0"] >= _LEAST_SQUARE if "dot_0_0" in moments else True
    return (spread >= least) & gram.isfinite().all(-1).all(-1) & large


def _added(values: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Return the sum of each sample, or of each group, in float64."""
    if dims is not None:
        return values.sum(dims, keepdim=True, dtype=torch.float64)
    values = values.flatten(1)
    whole = values.shape[1] // PART * PART
    parts = values[:, :whole].unflatten(1, (-1, PART)).sum(-1) if whole else values[:, :0]
    return parts.double().sum(1) + values[:, whole:].sum(1).double()
