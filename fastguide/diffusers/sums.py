"""Add and multiply traced outputs: say with which coefficients the result is a sum of them.

Sums and differences, also with other tensors such as the latents, multiples by a number or by one number a sample, and
casts are linear. Of norms and deviations, and what these scale, formulas are made: see formula_rules.py.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from . import formula_rules as rules
from .at_once import masked
from .formula import PRODUCT, Formula, general
from .halves import OfHalves
from .joined import Joined
from .lazy_tensor import plain
from .traced import (
    EXACT,
    LARGEST,
    Combined,
    ScaleAsSeen,
    Seen,
    Term,
    Traced,
    leading,
    own_value,
    seen_by_both,
    state_of_outputs,
)

Sum = tuple[tuple[Term, ...], ScaleAsSeen | None, Seen]
"""Terms, the scale of their factors, and the outputs that they are of, with their versions."""


def as_sum(operand: Any) -> Sum | None:
    """Return an operand as a sum of terms; ``None``: it is no linear combination that may wait."""
    kind = type(operand)
    if kind is OfHalves:
        operand, kind = operand.combined(), Combined
    if kind is Traced:
        source = operand.source
        return (((operand, 1.0, 0.0),), None, ((source, source.version()),)) if source.may_wait() else None
    if kind is Combined and operand.is_pending():
        return operand.terms, operand.scale, operand.seen
    return None


def _are_alike(first: Traced, second: Traced) -> bool:
    """Tell whether both are outputs of the same pipeline, of the same shape and device."""
    one, other = first.source, second.source
    if one is other and first.piece is not None and second.piece is not None:
        return first.piece[1] == second.piece[1]
    if one.fusion is not other.fusion:
        return False
    left, right = first.value(), second.value()
    return left.shape == right.shape and left.device == right.device


def _is_same(first: Traced, second: Traced) -> bool:
    if first is second or (first._value is not None and first._value is second._value):
        return True
    return first.piece is not None and first.source is second.source and first.piece == second.piece


def _merged(left: tuple[Term, ...], right: tuple[Term, ...], sign: float) -> tuple[Term, ...]:
    """Return the terms of both, the second ones with a sign."""
    merged = list(left)
    for of, constant, factor in right:
        for place, (other, before, factor_before) in enumerate(merged):
            if _is_same(of, other):
                merged[place] = (other, before + sign * constant, factor_before + sign * factor)
                break
        else:
            merged.append((of, sign * constant, sign * factor))
    return tuple(merged)


_NAMES = {operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div"}


def beyond(function: Any, first: Any, second: Any) -> Any:
    """Return what an operator makes of operands that it makes no combination of: a formula, or a tensor."""
    name = _NAMES[function]
    made = rules.combined(name, function, first, second)
    if made is None and name == "mul":
        made = masked(function, first, second)
    return function(plain(first, name), plain(second, name)) if made is None else made


def total(function: Any, first: Any, second: Any, sign: float) -> Any:
    """Return the sum of two operands, the second with a sign; ``function``: of torch, which computes it."""
    first, second = general(first), general(second)
    if type(first) is Traced and first.piece is not None:
        made = _sum_of_pieces(function, first, second, sign)
        if made is not None:
            return made
    left, right = as_sum(first), as_sum(second)
    if left is None or right is None:
        return _sum_beside(function, first, second, left, right, sign)
    scale = left[1] if right[1] is None else right[1]
    if left[1] is not None and scale is not None and not left[1].is_same(scale):
        return beyond(function, first, second)
    if not _are_alike(left[0][0][0], right[0][0][0]):
        return beyond(function, first, second)
    if left[2][0][0].step != right[2][0][0].step:  # a state, such as momentum's: it would grow at each step
        with torch.inference_mode(False):  # so that torch counts who writes to it
            return state_of_outputs(function(own_value(first), own_value(second)), left[2][0][0].fusion)
    terms, seen = _merged(left[0], right[0], sign), seen_by_both(left[2], right[2])
    dtype = first.dtype if first.dtype == second.dtype else torch.promote_types(first.dtype, second.dtype)
    return Combined((function, first, second), terms, scale, dtype, seen)


def _sum_beside(function: Any, first: Any, second: Any, left: Sum | None, right: Sum | None, sign: float) -> Any:
    """Return the sum of operands of which one at most is linear: with 0, or with a tensor such as the latents."""
    found, own, other = (left, first, second) if right is None else (right, second, first)
    if found is not None:
        if rules.number_of(other) == 0 and (right is None or sign > 0):
            made_by = function, rules.as_read(first), rules.as_read(second)
            return Combined(made_by, found[0], found[1], own.dtype, found[2])
        added = rules.tensor_beside(other, own)
        if added is not None:
            return total(function, first, added, sign) if right is None else total(function, added, second, sign)
    return beyond(function, first, second)


def _sum_of_pieces(function: Any, first: Traced, second: Any, sign: float) -> Combined | None:
    """Return a sum in the common case, parts of one output's batch; ``None``: it is another one."""
    source = first.source
    if source.escaped or not source.is_linear:
        return None
    if type(second) is Traced:
        piece, other = first.piece, second.piece
        assert piece is not None
        if second.source is not source or other is None or other == piece or other[1] != piece[1]:
            return None
        terms: tuple[Term, ...] = ((first, 1.0, 0.0), (second, sign, 0.0))
        return Combined((function, first, second), terms, None, source.dtype, ((source, source.version()),))
    if type(second) is not Combined or second._dtype is not source.dtype or not second.is_pending():
        return None
    seen, piece = second.seen, second.terms[0][0].piece
    if len(seen) > 1 or seen[0][0] is not source or piece is None or piece[1] != first.piece[1]:  # type: ignore[index]
        return None
    return Combined(
        (function, first, second), _merged(((first, 1.0, 0.0),), second.terms, sign), second.scale, source.dtype, seen
    )


def product(function: Any, first: Any, second: Any, invert: bool = False) -> Any:
    """Return a combination times, or divided by, a number or a number for each sample."""
    first, second = general(first), general(second)
    operand, other, found = first, second, as_sum(first)
    if found is None:
        operand, other, found = second, first, None if invert else as_sum(second)
    if found is None:
        return beyond(function, first, second)
    terms, scale, seen = found
    number = other if type(other) is float and abs(other) < LARGEST else rules.number_of(other)
    if number is not None and not (invert and number == 0):
        by = 1.0 / number if invert else number
        scaled = tuple([(of, constant * by, factor * by) for of, constant, factor in terms])
        if type(other) is Tensor:
            first, second = rules.as_read(first), rules.as_read(second)
        return Combined((function, first, second), scaled, scale, operand.dtype, seen)
    if number is None and not invert and scale is None and _is_scale(other, operand, terms):
        scaled = tuple([(of, 0.0, constant) for of, constant, _ in terms])
        as_seen = ScaleAsSeen.of(other)
        first, second = (first, as_seen.tensor) if operand is first else (as_seen.tensor, second)
        return Combined((function, first, second), scaled, as_seen, operand.dtype, seen)
    if invert and scale is not None and _cancels(scale, other, terms):
        constants = tuple([(of, factor, 0.0) for of, _, factor in terms])
        return Combined((function, first, scale.tensor), constants, None, operand.dtype, seen)
    return beyond(function, first, second)


def _cancels(scale: ScaleAsSeen, divisor: Any, terms: tuple[Term, ...]) -> bool:
    """Tell whether a divisor is the scale of all that there is: of x_0 and back, sigma is gone."""
    if type(divisor) is not Tensor or any([abs(constant) > EXACT for _, constant, _ in terms]):  # noqa: C419
        return False
    return not scale.is_changed() and scale.is_same(ScaleAsSeen.of(divisor))


def _is_scale(scale: Any, operand: Any, terms: tuple[Term, ...]) -> bool:
    """Tell whether a tensor is one number, or one for each sample, that leaves an operand's dtype as it is.

    Of a difference, it may be one for each frame as well: it is a scale of guidance there, and not a mask.
    """
    if type(scale) is not Tensor or scale.requires_grad or not scale.is_floating_point():
        return False
    like, lead = operand.like(), 0
    if scale.dim() > 0:
        if scale.dim() != like.dim() or scale.dtype != operand.dtype:
            return False
        lead = leading(scale)
        if lead > 1 and not (len(terms) == 2 and terms[0][1] + terms[1][1] == 0.0):
            return False
    fits = scale.shape[:lead] == like.shape[:lead]
    return fits and (scale.device == like.device or scale.dim() == 0)


def interpolated(first: Any, second: Any, weight: Any) -> Any:
    """Return ``torch.lerp``."""
    first, second = general(first), general(second)
    left, right = as_sum(first), as_sum(second)
    by_samples = rules.number_of(weight) is not None or (left is not None and _is_scale(weight, first, ()))
    if left is not None and right is not None and first.dtype == second.dtype and by_samples:
        scaled = product(operator.mul, weight, total(operator.sub, second, first, -1.0))
        made = total(operator.add, first, scaled, 1.0)
        if type(scaled) is type(made) is Combined:
            made.made_by = (torch.lerp, first, second, scaled.made_by[1])  # the weight as it was read
            return made
    return torch.lerp(*plain((first, second, weight), "lerp"))


def negative(operand: Any) -> Any:
    """Return an operand times -1."""
    operand = general(operand)
    if type(operand) is Joined and type(operand.main) is Combined and operand.is_pending():
        main, rest = negative(operand.main), negative(operand.rest)
        if type(main) is type(rest) is Combined:
            return Joined(main, rest)
    found = as_sum(operand)
    if found is None:
        made = rules.negative(operand)
        return operator.neg(plain(operand, "neg")) if made is None else made
    terms = tuple([(of, -constant, -factor) for of, constant, factor in found[0]])
    return Combined((operator.neg, operand), terms, found[1], operand.dtype, found[2])


def cast(operand: Any, dtype: Any) -> Any:
    """Return an operand in another dtype: what is traced is cast in the step."""
    if dtype is None or operand.dtype == dtype:
        return operand
    operand = general(operand)
    if type(operand) is Formula and operand.kind != PRODUCT:
        return rules.cast(operand, dtype)
    found = as_sum(operand)
    if found is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return plain(operand, "to").to(dtype)
    return Combined((lambda tensor: tensor.to(dtype), operand), found[0], found[1], dtype, found[2])
