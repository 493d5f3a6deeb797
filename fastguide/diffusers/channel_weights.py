"""Weigh the predictions of guided channels and of those after them, which are one prediction's: a channel is a sample.

Lumina's pipeline guides the first three channels, and takes the others from the conditional prediction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..guidance import Guidance
from .joined import Joined
from .traced import Combined, Term, Traced


def of_channels(joined: Joined, sample: Tensor) -> tuple[tuple[Tensor, ...], Guidance] | None:
    """Return the predictions of all of a sample's channels, and what weighs them, for each channel of each sample.

    ``None``: they are not of this form. The predictions are those that the guided channels are parts of; the first is
    the one that the other channels are a part of as well.
    """
    main = joined.main
    if type(main) is not Combined or main.scale is not None or sample.dim() < 2:
        return None
    terms: Sequence[Term] = main.terms
    rest: Sequence[Term] = ((joined.rest, 1.0, 0.0),) if type(joined.rest) is Traced else joined.rest.terms
    if len(rest) != 1:
        return None
    (of_rest, constant, _), guided = rest[0], main.like().shape[1]
    wholes = [_with_channels_after(of, sample.shape) for of, _, _ in terms]
    others = [whole is not None and _is_same(whole[:, guided:], of_rest.value()) for whole in wholes]
    if None in wholes or others.count(True) != 1:
        return None
    place = others.index(True)
    order = [place, *(each for each in range(len(terms)) if each != place)]
    weights = tuple([terms[each][1] for each in order])
    counts = guided, sample.shape[1] - guided, sample.shape[0]
    return tuple([wholes[each] for each in order]), _guidance(weights, constant, *counts)  # type: ignore[misc]


def _with_channels_after(of: Traced, shape: torch.Size) -> Tensor | None:
    """Return the part of an output that begins as a part of its channels does, and has a sample's shape."""
    part, whole = of.value(), of.source.tensor
    if part.dim() != len(shape) or part.shape[1] > shape[1] or (*part.shape[:1], *part.shape[2:]) != (
        *shape[:1], *shape[2:],
    ):  # fmt: skip
        return None
    last = part.storage_offset() + sum((size - 1) * stride for size, stride in zip(shape, part.stride(), strict=True))
    begin = whole.storage_offset()
    end = begin + sum((size - 1) * stride for size, stride in zip(whole.shape, whole.stride(), strict=True))
    return part.as_strided(shape, part.stride()) if begin <= part.storage_offset() and last <= end else None


def _is_same(part: Tensor, other: Tensor) -> bool:
    """Tell whether two views are of the same elements."""
    where = part.data_ptr() == other.data_ptr() and part.stride() == other.stride()
    return where and part.shape == other.shape and part.dtype == other.dtype and part.numel() > 0


@functools.lru_cache(maxsize=16)
def _guidance(weights: tuple[float, ...], constant: float, guided: int, rest: int, batch: int) -> Guidance:
    """Return the guidance of channels one after the other: the first of each sample are guided."""
    of_guided = [sum(weights), *weights[1:], 0.0]
    of_rest = [constant, *[0.0] * len(weights)]
    rows = torch.tensor([of_guided] * guided + [of_rest] * rest, dtype=torch.float64, device="cpu")
    return Guidance(rows.repeat(batch, 1)[None], None)
