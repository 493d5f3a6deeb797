"""Compute what waits by the pipeline's own operations, and keep nothing: neither it nor what it is of stops waiting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .lazy_tensor import plain
from .traced import Traced, Waiting

Tensors = dict[Any, Tensor]
"""What outputs are taken to be, and what was made of them, by ``key_of``."""


def key_of(operand: Traced | Waiting) -> Any:
    """Return what is the same for the same part or view of an output, or for the same object."""
    if type(operand) is not Traced:
        return id(operand)
    return id(operand.value()) if operand.piece is None else (id(operand.source), operand.piece)


def remade(operand: Any, tensors: Tensors) -> Tensor:
    """Return what an operand stands for.

    Args:
        operand: a tensor, or what stands for one.
        tensors: has the tensors in the place of outputs, for those that are not to be taken themselves; gets what is
            made on the way.
    """
    if not isinstance(operand, (Traced, Waiting)):
        value: Tensor = plain(operand)
        return value
    key = key_of(operand)
    found = tensors.get(key)
    if found is None and isinstance(operand, Traced):
        return operand.value()
    if found is None:
        assert isinstance(operand, Waiting)
        function, *operands = operand.made_by
        found = tensors[key] = function(*[remade(each, tensors) for each in operands])
    return found


def are_of(operands: Iterable[Any], keys: set[Any]) -> bool:
    """Tell whether all outputs that operands were computed of are among these."""
    waiting, found = list(operands), set()
    while waiting:
        operand = waiting.pop()
        if isinstance(operand, Traced):
            if key_of(operand) not in keys:
                return False
        elif isinstance(operand, Waiting) and id(operand) not in found:
            found.add(id(operand))
            waiting += operand.made_by[1:]
    return True
