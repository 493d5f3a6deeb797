"""Compare numbers that are made of models' outputs at once, and trace on: some pipelines decide in Python by norms.

Z-Image's goes on with another formula if guidance has a larger norm than the prediction. So the host has to know both
numbers then. Norms of sums are made of inner products of the outputs, so that no sum is computed for them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .formula import NUMBER, PRODUCT, Formula, as_vector
from .known import unknown
from .lazy_tensor import plain
from .traced import Combined, Traced

LEAST_ELEMENTS = 2**18
"""Of a sample: for fewer, it takes longer to trace on than the pipeline's own operations take."""
_LEAST_SHARE = 1e-3
"""Of what a squared norm is a sum of: if less is left, it has lost too many digits."""


def compared(name: str) -> Callable[..., Any]:
    """Return the rule of a comparison; ``name``: of torch's function."""
    function, decides = getattr(torch, name), getattr(operator, name)

    def rule(first: Any, second: Any) -> Any:
        first, second = unknown(first), unknown(second)
        numbers = _numbers_of(first, second) if type(first) is Formula or type(second) is Formula else None
        if numbers is None:
            return function(plain(first, name), plain(second, name))
        sizes = [each.sizes for each in (first, second) if type(each) is Formula]
        return torch.full(max(sizes, key=len), decides(*numbers), device="cpu")

    return rule


def _numbers_of(first: Any, second: Any) -> tuple[float, float] | None:
    """Return two numbers that are Python's, or made of sums over one large sample; ``None``: they are not."""
    for each in (first, second):
        if type(each) is Formula:
            if each.kind != NUMBER or each.sizes.numel() != 1 or not each.is_pending():
                return None
        elif not isinstance(each, (int, float)):
            return None
    of = (first if type(first) is Formula else second).of.like()
    if not of.is_cpu or of.numel() < LEAST_ELEMENTS:
        return None
    sums = _Sums()
    left = sums.number_of(first)
    right = None if left is None else sums.number_of(second)
    return None if left is None or right is None else (left, right)


class _Sums:
    """Numbers of one comparison, and the inner products that they are made of."""

    def __init__(self) -> None:
        self._products: dict[tuple[int, int], float] = {}
        self._flat: dict[int, Tensor] = {}

    def number_of(self, operand: Any) -> float | None:
        """Return a number as it is now; ``None``: it is made of something else as well."""
        if type(operand) is not Formula:
            return float(operand) if isinstance(operand, (int, float)) else None
        if operand.kind != NUMBER:
            return None
        if operand.operation == "norm":
            operand.check_unchanged()
            square = self._inner(operand.operands[0], operand.operands[0])
            return None if square is None else math.sqrt(square)
        if operand.operation == "sum":
            operand.check_unchanged()
            (summed,) = operand.operands
            is_product = type(summed) is Formula and summed.kind == PRODUCT
            return self._inner(*summed.operands) if is_product and len(summed.operands) == 2 else None
        of = [self.number_of(each) for each in operand.operands]
        made = _OPERATIONS.get(operand.operation)
        if made is None or None in of:
            return None
        try:
            return made(*of)
        except (ValueError, ZeroDivisionError, OverflowError):  # torch has an infinity, or NaN
            return None

    def _inner(self, first: Any, second: Any) -> float | None:
        left, right = _terms_of(first), _terms_of(second)
        if left is None or right is None:
            return None
        parts = [a * b * self._product(one, other) for one, a in left for other, b in right]
        total = math.fsum(parts)
        enough = total > _LEAST_SHARE * math.fsum(map(abs, parts))  # which NaN is not
        return total if enough and total < math.inf else None

    def _product(self, first: Tensor, second: Tensor) -> float:
        key = min(id(first), id(second)), max(id(first), id(second))
        found = self._products.get(key)
        if found is None:
            one, other = self._flattened(first), self._flattened(second)
            if one.dtype != other.dtype:  # float32, and float64
                one, other = one.double(), other.double()
            found = self._products[key] = torch.dot(one, other).item()
        return found

    def _flattened(self, tensor: Tensor) -> Tensor:
        flat = self._flat.get(id(tensor))
        if flat is None:
            flat = self._flat[id(tensor)] = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).reshape(-1)
        return flat


def _terms_of(vector: Any) -> list[tuple[Tensor, float]] | None:
    """Return the tensors that a sum is of, with their coefficients; ``None``: it is none of numbers that are known."""
    while type(vector) is Formula and vector.operation == "same":
        (vector,) = vector.operands
    vector = None if type(vector) is Formula else as_vector(vector)
    if type(vector) is Traced:
        return [(vector.value(), 1.0)]
    if type(vector) is Combined and vector.scale is None:
        return [(of.value(), constant) for of, constant, _ in vector.terms]
    return None


_OPERATIONS: dict[str, Callable[..., float]] = {
    "same": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "minimum": min,
    "maximum": max,
}
"""Of numbers that are finite."""
