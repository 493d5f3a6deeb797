"""Say what of a sample gets weights of its own: the whole of it, or groups of its elements, such as tokens or rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

Dim: TypeAlias = "int | Sequence[int]"


def dims_of(name: str, dim: Dim | None) -> tuple[int, ...] | None:
    """Return the dimensions that a group of elements spans; ``None``: a group is a whole sample.

    Raises:
        TypeError, ValueError: they are no numbers, none, or the batch is among them.
    """
    if dim is None:
        return None
    dims = (dim,) if isinstance(dim, int) and not isinstance(dim, bool) else dim
    if not isinstance(dims, Sequence) or isinstance(dims, str):
        raise TypeError(f"{name}: expected an int, several, or None for the whole sample, got {dim!r}")
    if not dims or not all(isinstance(each, int) and not isinstance(each, bool) for each in dims):
        raise TypeError(f"{name}: expected an int, several, or None for the whole sample, got {dim!r}")
    if 0 in dims:
        raise ValueError(f"{name}: expected dimensions of a sample, so not 0, the batch, got {dim!r}")
    return tuple(dims)


def resolved(dims: Sequence[int], sample: Tensor) -> tuple[int, ...]:
    """Return dimensions as they are counted from the first one, in order.

    Raises:
        ValueError: the sample has no such dimension, has it twice, or it is the batch.
    """
    rank = sample.dim()
    counted = sorted(each + rank if each < 0 else each for each in dims)
    if counted[0] < 1 or counted[-1] >= rank or len(set(counted)) < len(counted):
        raise ValueError(
            f"guidance: expected norms over dimensions of a sample of shape {tuple(sample.shape)}, 1 to {rank - 1} and "
            f"each once, got {tuple(dims)}"
        )
    return tuple(counted)


def number_of_groups(dims: Sequence[int] | None, sample: Tensor) -> int:
    """Return how many groups a sample has."""
    if dims is None:
        return 1
    spanned = resolved(dims, sample)
    return math.prod(size for k, size in enumerate(sample.shape) if k and k not in spanned)


def lie_in_blocks(dims: Sequence[int], sample: Tensor) -> bool:
    """Tell whether each group of a sample, which is dense, fills a block of memory; the blocks follow each other."""
    expected = 1
    for stride, size in sorted((sample.stride(k), sample.shape[k]) for k in resolved(dims, sample)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
