"""Backward passes of batches of gradients, which torch maps over: they are made for one gradient after the other.

``torch.autograd.grad(..., is_grads_batched=True)`` and ``torch.autograd.functional`` with ``vectorize=True`` do so by
torch's older kind of batches, ``torch.vmap`` over ``torch.autograd.grad`` by its newer one. No kernel takes either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

Gradients = Sequence[Tensor | None]
Pass = Callable[..., Gradients]
"""A backward pass: it makes new tensors, and ``None`` in the same places whatever the gradients that come in are."""

_LEVELS = 64
"""The most batches within batches of torch's older kind."""


def for_each_gradient(backward: Pass, *came: Tensor | None) -> Gradients:
    """Return ``backward(*came)``, which is not recorded; of batches of gradients, batches of what it makes of each."""
    with torch.no_grad():
        batch = OlderBatch.among(came)
        if batch is not None:
            made = _one_by_one(backward, batch.apart(came), batch.size)
            return batch.joined(made)
        if _functorch.peek_interpreter_stack() is None:
            return backward(*came)
        mapped: Gradients = _Mapped.apply(backward, *came)  # type: ignore[no-untyped-call]
        return mapped


class OlderBatch(NamedTuple):
    """What torch's older kind of batches has in common where it maps over a function."""

    level: int
    size: int

    @classmethod
    def among(cls, tensors: Sequence[object]) -> OlderBatch | None:
        """Return what those of the tensors that are batches have in common; ``None``: none is."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and _functorch.is_legacy_batchedtensor(tensor):
                # torch tells no level, but of what is no batch at a level makes one of the size that is named.
                sizes = ((level, len(torch._remove_batch_dim(tensor, level, 0, 0))) for level in range(1, _LEVELS + 1))
                return next(cls(level, size) for level, size in sizes if size)
        return None

    def apart(self, tensors: Sequence[Any]) -> list[Any]:
        """Return tensors with one more dimension, the first, along which lies what was mapped over."""
        return [
            torch._remove_batch_dim(each, self.level, self.size, 0) if isinstance(each, Tensor) else each
            for each in tensors
        ]

    def joined(self, tensors: Gradients) -> Gradients:
        """Return such tensors as batches."""
        return [None if each is None else torch._add_batch_dim(each, 0, self.level) for each in tensors]


def _one_by_one(backward: Pass, came: Gradients, count: int) -> list[Tensor | None]:
    """Return what is made of each of so many gradients, which lie along the first dimension."""
    if count == 0:  # as many tensors as of one gradient, whose values nobody gets
        one = [None if grad is None else grad.new_zeros(1, *grad.shape[1:]) for grad in came]
        return [None if grads is None else grads[:0] for grads in _one_by_one(backward, one, 1)]
    each = [repeat(None, count) if grad is None else grad.unbind() for grad in came]
    made = [for_each_gradient(backward, *own) for own in zip(*each, strict=True)]
    return [None if grads[0] is None else torch.stack(grads) for grads in zip(*made, strict=True)]


class _Mapped(torch.autograd.Function):
    """A backward pass within ``torch.vmap``."""

    @staticmethod
    def forward(backward: Pass, *came: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(backward(*came))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: it is not recorded."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backward: Pass, *came: Tensor | None) -> Any:
        apart = [
            None if grad is None else grad.expand(info.batch_size, *grad.shape) if dim is None else grad.movedim(dim, 0)
            for grad, dim in zip(came, in_dims[1:], strict=True)
        ]
        made = _one_by_one(backward, apart, info.batch_size)
        return tuple(made), tuple([None if grads is None else 0 for grads in made])
