"""Say what of a sample gets weights of its own: the whole of it, or groups of its elements, such as tokens or rows."""

from __future__ import annotations

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
    spanned: tuple[int, ...] = ()
    for k in range(1, rank):
        for each in dims:  # compared one by one: torch.compile may not know the numbers
            if each == k or each == k - rank:
                spanned = *spanned, k
                break
    if len(spanned) != len(dims):
        raise ValueError(
            f"guidance: expected norms over dimensions of a sample of shape {tuple(sample.shape)}, 1 to {rank - 1} and "
            f"each once, got {tuple(dims)}"
        )
    return spanned


def number_of_groups(dims: Sequence[int] | None, sample: Tensor) -> int:
    """Return how many groups a sample has."""
    if dims is None:
        return 1
    spanned, groups = resolved(dims, sample), 1
    for k in range(1, sample.dim()):
        groups *= 1 if k in spanned else sample.shape[k]
    return groups


def lie_in_blocks(dims: Sequence[int], sample: Tensor) -> bool:
    """Tell whether each group of a sample, which is dense, fills a block of memory; the blocks follow each other."""
    spanned, block = resolved(dims, sample), 1
    for k in spanned:
        block *= sample.shape[k]
    for k in range(1, sample.dim()):  # not sorted: torch.compile may not know the numbers
        if sample.shape[k] > 1:
            within = sample.stride(k) < block
            if (k in spanned and not within) or (k not in spanned and within):  # as symbols, they do not compare
                return False
    return True


def sizes_of_groups(dims: Sequence[int], sample: Tensor) -> tuple[list[int], list[int]]:
    """Return the sizes of the dimensions that groups do not span, as they lie in memory, and where each of them is."""
    spanned = resolved(dims, sample)
    others = [k for k in range(1, sample.dim()) if k not in spanned]
    strides = sample.stride()
    lying = sorted(others, key=lambda k: (-strides[k], sample.shape[k] > 1))
    return [sample.shape[k] for k in lying], [lying.index(k) for k in others]
