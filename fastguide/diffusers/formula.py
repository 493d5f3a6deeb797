"""Stand for what a pipeline computes of its model's outputs beyond their sums: norms, deviations, and what these scale.

A ``Formula`` is a vector (a combination of outputs whose coefficients are numbers of each sample), the product of two
vectors element by element, which waits for its sum, or such a number. The scheduler's step takes it as a program that
makes weights from moments: see weights_of_formula.py. Whatever else is asked for computes the tensors, by the very
operations that the pipeline asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .halves import OfHalves
from .known import unknown
from .traced import WRITTEN_TO, Combined, ScaleAsSeen, Traced, Waiting, leading, seen_by_both

VECTOR, PRODUCT, NUMBER = range(3)
"""Kinds of a formula: of vectors, there is an element for each of the sample's; of numbers, one a sample."""
Operand = Any
"""``Traced``, ``Combined`` or ``Formula``; a float; or ``ScaleAsSeen``, a tensor with a number for each sample."""


class Groups(NamedTuple):
    """The tokens, or other groups of elements, that norms and sums are of. A number of each has size 1 in ``dims``."""

    sizes: torch.Size
    """The shape of the vector that was summed: in another shape, the same dimensions are of other elements."""
    dims: tuple[int, ...]
    """Those of that vector which it was summed over, counted from the first one, in order."""


Spans: TypeAlias = "Groups | tuple[()] | None"
"""What the norms and sums within a formula are over, all the same: groups, or ``()``, whole samples; ``None``: there
are none."""


class Formula(Waiting):
    """An operation of vectors or numbers, and what it is of."""

    __slots__ = ("_ahead", "kind", "of", "operands", "operation", "sizes", "spans")

    def __init__(
        self,
        kind: int,
        operation: str,
        operands: tuple[Operand, ...],
        made_by: tuple[Any, ...],
        sizes: torch.Size,
        dtype: torch.dtype,
        spans: Spans = None,
        base: Formula | None = None,
    ) -> None:
        seen = of = None
        for operand in operands:
            if isinstance(operand, Waiting):
                found = operand.seen
                first = operand.of if type(operand) is Formula else operand
                spans = spans_of(operand) if spans is None else spans
            elif type(operand) is Traced:
                found = ((operand.source, operand.source.version()),)
                first = operand
            else:
                continue
            of = first if of is None else of
            seen = found if seen is None else seen_by_both(seen, found)
        assert seen is not None
        super().__init__(made_by, dtype, seen, base)
        self.kind = kind
        self.operation = operation
        """Of ``fastguide.guidance.symbols``, or one that changes no number: ``"same"``."""
        self.operands = operands
        self.sizes = sizes
        self.spans: Spans = spans
        self.of: Any = of
        """A vector that it is made of."""
        self._ahead: Traced | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""
        return self.sizes

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        like: Tensor = self.of.like()
        if self.kind == NUMBER:
            return torch.empty(self.sizes, dtype=self._dtype, device=like.device)
        return like.view(self.sizes)

    def ahead(self) -> Traced | None:
        """Return what it, or what it is a view of, was made as ahead of the step; ``None``: it was not."""
        if self._ahead is None and self.base is not None:
            whole = self.base.ahead()
            if whole is not None:
                function, _ = self.made_by
                self.become(Traced(whole.source, function(whole.value())))
        return self._ahead

    def become(self, ahead: Traced) -> None:
        """Have the memory of what was made of it ahead of the step, as parts of that have."""
        self._ahead = ahead
        self._hand_out(ahead.value())

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor, for any use, the same one each time; ``by``: the operation that asks."""
        ahead = self.ahead()
        return super().computed(by) if ahead is None else ahead.computed(by)

    def check_unchanged(self) -> None:
        """Refuse outputs and numbers that are not what they were when they were used.

        Raises:
            RuntimeError: one has been written to since.
        """
        super().check_unchanged()
        for operand in self.operands:
            if type(operand) is ScaleAsSeen and operand.is_changed():
                raise RuntimeError(f"the scale of guidance {WRITTEN_TO}")


# ---- What may be an operand ----


def general(operand: Any) -> Any:
    """Return an operand as a combination, if it is one of halves; a formula as made ahead of the step."""
    operand = unknown(operand)
    kind = type(operand)
    if kind is OfHalves:
        return operand.combined()
    ahead = operand.ahead() if kind is Formula else None
    return operand if ahead is None else ahead


def as_vector(operand: Any) -> Any:
    """Return an operand, if it is a vector that may wait; ``None``: it is not."""
    operand = unknown(operand)
    kind = type(operand)
    if kind is OfHalves:
        operand, kind = operand.combined(), Combined
    if kind is Traced:
        return operand if operand.source.may_wait() else None
    if kind is Combined:
        scale = operand.scale
        return operand if operand.is_pending() and (scale is None or leading(scale.tensor) < 2) else None
    if kind is not Formula or operand.kind != VECTOR:
        return None
    if operand.is_pending():
        return operand
    ahead = operand.ahead()
    return ahead if ahead is not None and ahead.source.may_wait() else None


def lies_in_order(tensor: Tensor) -> bool:
    """Tell whether the elements of each sample lie one after the other."""
    return tensor.is_contiguous() or tensor[0].is_contiguous()


def is_number(operand: Any) -> bool:
    """Tell whether an operand is a number of each sample that may wait."""
    return type(operand) is Formula and operand.kind == NUMBER and operand.is_pending()


def sizes_of(operand: Any) -> torch.Size:
    """Return the shape of a vector or number; of a float, none."""
    if type(operand) is Formula:
        return operand.sizes
    if type(operand) is ScaleAsSeen:
        return operand.tensor.shape
    return torch.Size() if type(operand) is float else operand.like().shape


def is_one_a_sample(sizes: torch.Size, of: torch.Size) -> bool:
    """Tell whether a tensor of this shape multiplies each sample of another shape by one number."""
    if len(sizes) == len(of) and sizes[0] == of[0]:
        return all(size == 1 for size in sizes[1:])
    return sizes.numel() == 1 and len(sizes) <= len(of) and (of[0] == 1 or len(sizes) == 0)


def is_whole(spans: Spans) -> bool:
    """Tell whether norms and sums are over all of a sample that has no dimension for the batch."""
    return bool(spans) and spans.dims == tuple(range(len(spans.sizes)))  # type: ignore[union-attr]


def have_spans_in_common(first: Operand, second: Operand) -> bool:
    """Tell whether norms and sums within two operands are of the same elements, or at most one has any."""
    one, other = spans_of(first), spans_of(second)
    return one is None or other is None or one == other


def spans_of(operand: Operand) -> Spans:
    """Return what the norms and sums within an operand are over."""
    return operand.spans if type(operand) is Formula else None


# ---- Making one ----


def promoted(operands: tuple[Operand, ...]) -> torch.dtype:
    """Return the dtype of what torch makes of operands, of which floats and tensors without dimensions do not count."""
    result = None
    for each in operands:
        if type(each) is float or (type(each) is ScaleAsSeen and each.tensor.dim() == 0):
            continue
        dtype = each.tensor.dtype if type(each) is ScaleAsSeen else each.dtype
        if result is not dtype:
            result = dtype if result is None else torch.promote_types(result, dtype)
    assert result is not None
    return result


def cast(operand: Formula, dtype: torch.dtype) -> Formula:
    """Return a formula in another dtype."""
    made_by = (lambda tensor: tensor.to(dtype)), operand
    return Formula(operand.kind, "same", (operand,), made_by, operand.sizes, dtype)


def stacked(operand: Formula) -> Formula | None:
    """Return a sample alone in a batch, as ``torch.stack`` does; ``None``: it is none that lies in order."""
    if operand.kind != VECTOR or not operand.is_pending() or not is_whole(operand.spans):
        return None
    if not operand.of.like().is_contiguous():
        return None
    sizes = torch.Size((1, *operand.sizes))
    return Formula(VECTOR, "same", (operand,), (lambda t: torch.stack([t]), operand), sizes, operand.dtype, ())


def viewed(operand: Formula, sizes: torch.Size, function: Callable[[Tensor], Tensor]) -> Formula:
    """Return a formula in another shape, which shares its memory once there is any."""
    return Formula(operand.kind, "same", (operand,), (function, operand), sizes, operand.dtype, base=operand)
