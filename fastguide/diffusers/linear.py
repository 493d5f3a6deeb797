"""Say which operations of torch's leave traced outputs traced, and with which coefficients.

Sums and differences of them, multiples by a number or by one number a sample, casts, and views are what the formulas of
guidance are made of. Whatever else is asked for computes the tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .halves import FIRST, SECOND, OfHalves, difference, guided, scaled
from .joined import Doubled, Joined
from .lazy_tensor import LazyTensor, plain
from .traced import LARGEST, Combined, ScaleAsSeen, Source, Term, Traced, leading

# ---- Arithmetic ----

Seen = tuple[tuple[Source, int | None], ...]
Sum = tuple[tuple[Term, ...], ScaleAsSeen | None, Seen]
"""Terms, the scale of their factors, and the outputs that they are of, with their versions."""


def _as_sum(operand: Any) -> Sum | None:
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


def _general(operand: Any) -> Any:
    """Return an operand as a combination, if it is one of halves."""
    return operand.combined() if type(operand) is OfHalves else operand


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
    if first is second:
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


def _seen(left: Seen, right: Seen) -> Seen:
    """Return the outputs of both; of one that both have, the earlier version, as one of them may have lost it."""
    if left == right:
        return left
    merged = dict(left)
    for source, version in right:
        before = merged.get(source, version)
        merged[source] = before if version is None or before is None else min(before, version)
    return tuple(merged.items())


def _sum(function: Any, first: Any, second: Any, sign: float) -> Any:
    """Return the sum of two operands, the second with a sign; ``function``: of torch, which computes it."""
    first, second = _general(first), _general(second)
    if type(first) is Traced and first.piece is not None:
        made = _sum_of_pieces(function, first, second, sign)
        if made is not None:
            return made
    left, right = _as_sum(first), _as_sum(second)
    if left is None or right is None or first.dtype != second.dtype:
        return function(plain(first), plain(second))
    scale = left[1] if right[1] is None else right[1]
    if left[1] is not None and scale is not None and not left[1].is_same(scale):
        return function(plain(first), plain(second))
    if not _are_alike(left[0][0][0], right[0][0][0]):
        return function(plain(first), plain(second))
    terms, seen = _merged(left[0], right[0], sign), _seen(left[2], right[2])
    return Combined((function, first, second), terms, scale, first.dtype, seen)


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


def _product(function: Any, first: Any, second: Any, invert: bool = False) -> Any:
    """Return a combination times, or divided by, a number or a number for each sample."""
    first, second = _general(first), _general(second)
    operand, other, found = first, second, _as_sum(first)
    if found is None:
        operand, other, found = second, first, None if invert else _as_sum(second)
    if found is None:
        return function(plain(first), plain(second))
    terms, scale, seen = found
    number = other if type(other) is float and abs(other) < LARGEST else _number(other)
    if number is not None and not (invert and number == 0):
        by = 1.0 / number if invert else number
        scaled = tuple([(of, constant * by, factor * by) for of, constant, factor in terms])
        return Combined((function, first, second), scaled, scale, operand.dtype, seen)
    if number is None and not invert and scale is None and _is_scale(other, operand):
        scaled = tuple([(of, 0.0, constant) for of, constant, _ in terms])
        as_seen = ScaleAsSeen.of(other)
        first, second = (first, as_seen.tensor) if operand is first else (as_seen.tensor, second)
        return Combined((function, first, second), scaled, as_seen, operand.dtype, seen)
    return function(plain(first), plain(second))


def _number(value: Any) -> float | None:
    if type(value) is not float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return None
        value = float(value)
    return value if abs(value) < LARGEST else None


def _is_scale(scale: Any, operand: Any) -> bool:
    """Tell whether a tensor is one number, or one for each sample or frame, that leaves an operand's dtype as it is."""
    if type(scale) is not Tensor or scale.requires_grad or not scale.is_floating_point():
        return False
    like, lead = operand.like(), 0
    if scale.dim() > 0:
        if scale.dim() != like.dim() or scale.dtype != operand.dtype:
            return False
        lead = leading(scale)
    fits = scale.shape[:lead] == like.shape[:lead]
    return fits and (scale.device == like.device or scale.dim() == 0)


def _interpolated(first: Any, second: Any, weight: Any) -> Any:
    """Return ``torch.lerp``."""
    first, second = _general(first), _general(second)
    left, right = _as_sum(first), _as_sum(second)
    if left is not None and right is not None and first.dtype == second.dtype:
        made = _sum(operator.add, first, _product(operator.mul, weight, _sum(operator.sub, second, first, -1.0)), 1.0)
        if type(made) is Combined:
            made.made_by = (torch.lerp, first, second, weight)
            return made
    return torch.lerp(plain(first), plain(second), plain(weight))


def _negative(operand: Any) -> Any:
    operand = _general(operand)
    if type(operand) is Joined and type(operand.main) is Combined and operand.is_pending():
        main, rest = _negative(operand.main), _negative(operand.rest)
        if type(main) is type(rest) is Combined:
            return Joined(main, rest)
    found = _as_sum(operand)
    if found is None:
        return operator.neg(plain(operand))
    terms = tuple([(of, -constant, -factor) for of, constant, factor in found[0]])
    return Combined((operator.neg, operand), terms, found[1], operand.dtype, found[2])


def _cast(operand: Any, dtype: Any) -> Any:
    """Return an operand in another dtype: what is traced is cast in the step."""
    if dtype is None or operand.dtype == dtype:
        return operand
    operand = _general(operand)
    found = _as_sum(operand)
    if found is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return plain(operand).to(dtype)
    return Combined((lambda tensor: tensor.to(dtype), operand), found[0], found[1], dtype, found[2])


# ---- Views ----


def _chunk(operand: Any, chunks: int, dim: int = 0) -> Any:
    """Return the parts; those of a whole output along its batch without making tensors of them."""
    if type(operand) is Joined:
        return operand.chunk(chunks, dim)
    if type(operand) is Traced and operand._value is operand.source.tensor and dim == 0:
        tensor = operand.source.tensor
        counted = type(chunks) is int and chunks > 1 and tensor.dim() > 0 and not tensor.requires_grad
        if counted and tensor.shape[0] % chunks == 0:
            source = operand.source
            if chunks == 2:
                return Traced(source, None, FIRST), Traced(source, None, SECOND)
            return tuple([Traced(source, None, (number, chunks)) for number in range(chunks)])
    return _parts(lambda each: each.chunk(chunks, dim), operand)


def _halved(self: Traced, chunks: int, dim: int = 0) -> Any:
    """Return the parts of an output, as its method: mostly halves along the batch."""
    source = self.source
    if chunks == 2 and dim == 0 and self._value is source.tensor and source.is_linear:
        shape = source.tensor.shape
        if shape and shape[0] % 2 == 0:
            return Traced(source, None, FIRST), Traced(source, None, SECOND)
    return _chunk(self, chunks, dim)


def _split(operand: Any, split_size: Any, dim: int = 0) -> Any:
    if type(operand) is Joined:
        return operand.split(split_size, dim)
    return _parts(lambda each: each.split(split_size, dim), operand)


def _view(operand: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return a view of an operand, as one of each of its terms."""
    parts = _parts(lambda tensor: (function(tensor),), operand)
    return parts[0]


def _parts(function: Callable[[Tensor], Any], operand: Any) -> Any:
    """Return parts of an operand, which a function of tensors makes: of each of its terms, if they are views."""
    operand = _general(operand)
    found = _as_sum(operand)
    if found is None or (found[1] is not None and found[1].tensor.dim() > 0):
        return function(plain(operand))
    values = [of.value() for of, *_ in found[0]]
    made = [function(value) for value in values]
    if not all(_shares(part, value) for parts, value in zip(made, values, strict=True) for part in parts):
        return function(plain(operand))
    sources = [of.source for of, *_ in found[0]]
    traced = [[Traced(source, part) for part in parts] for source, parts in zip(sources, made, strict=True)]
    if type(operand) is Traced:
        return tuple(traced[0])
    return tuple(
        Combined(
            (lambda tensor, number=number: function(tensor)[number], operand),
            tuple((of, *term[1:]) for of, term in zip(pieces, found[0], strict=True)),
            found[1],
            operand.dtype,
            found[2],
            operand,
        )
        for number, pieces in enumerate(zip(*traced, strict=True))
    )


def _shares(part: Any, whole: Tensor) -> bool:
    if type(part) is not Tensor or part.dtype != whole.dtype:
        return False
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _joined(tensors: Any, dim: int = 0) -> Any:
    """Return ``torch.cat``: in the channels, of guidance and what the model returned besides; or of it, twice."""
    if isinstance(tensors, (list, tuple)) and len(tensors) == 2:
        main, rest = _general(tensors[0]), tensors[1]
        if dim == 0 and type(main) is Combined and tensors[1] is tensors[0] and main.is_pending():
            return Doubled(main)
        if dim == 1 and type(main) in (Combined, Doubled) and type(rest) is Traced and main.is_pending():
            if type(main) is Doubled and rest.value().shape[1] == 0:
                return Doubled(main.main)
            if _may_be_joined(main, rest):
                return Joined(main, rest)
    return torch.cat([plain(tensor) for tensor in tensors], dim)


def _may_be_joined(main: Combined | Doubled, rest: Traced) -> bool:
    first, second = main.like().shape, rest.value().shape
    fits = len(first) == len(second) > 1 and first[:1] + first[2:] == second[:1] + second[2:]
    return fits and rest.source.may_wait() and main.dtype == rest.dtype


def _stacked(tensors: Any, dim: int = 0) -> Any:
    """Return ``torch.stack``: of one tensor, it has one term for each of the tensor's."""
    if isinstance(tensors, (list, tuple)) and len(tensors) == 1:
        tensors = [_general(tensors[0])]
        found = _as_sum(tensors[0])
        if found is not None and (found[1] is None or found[1].tensor.dim() == 0):
            terms = tuple([(Traced(of.source, of.value().unsqueeze(dim)), *how) for of, *how in found[0]])
            made_by = (lambda tensor: torch.stack([tensor], dim)), tensors[0]
            return Combined(made_by, terms, found[1], tensors[0].dtype, found[2])  # type: ignore[arg-type]
    return torch.stack([plain(tensor) for tensor in tensors], dim)


# ---- torch's functions, and Python's operators ----


def _names(*names: str) -> list[Any]:
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


def _moved(operand: Any, *arguments: Any) -> Any:
    """Return ``Tensor.to`` with these arguments."""
    if len(arguments) == 1 and isinstance(arguments[0], torch.dtype):
        return _cast(operand, arguments[0])
    if len(arguments) == 1 and isinstance(arguments[0], (str, torch.device)):
        same = operand.like().device == torch.device(arguments[0])
        return operand if same else plain(operand).to(*arguments)
    return plain(operand).to(*plain(arguments))


def _add(first: Any, second: Any) -> Any:
    made = guided(first, second) if type(second) is OfHalves else guided(second, first)
    return _sum(operator.add, first, second, 1.0) if made is None else made


def _sub(first: Any, second: Any) -> Any:
    made = difference(first, second)
    return _sum(operator.sub, first, second, -1.0) if made is None else made


def _mul(first: Any, second: Any) -> Any:
    made = scaled(first, second) if type(second) is OfHalves else scaled(second, first)
    return _product(operator.mul, first, second) if made is None else made


def _div(first: Any, second: Any) -> Any:
    return _product(operator.truediv, first, second, invert=True)


_RULES: dict[tuple[str, ...], Callable[..., Any]] = {
    ("add", "__add__"): _add,
    ("__radd__",): lambda first, second: _add(second, first),
    ("sub", "__sub__", "subtract"): _sub,
    ("__rsub__",): lambda first, second: _sub(second, first),
    ("mul", "__mul__", "multiply"): _mul,
    ("__rmul__",): lambda first, second: _mul(second, first),
    ("div", "__truediv__", "divide", "true_divide"): _div,
    ("neg", "__neg__", "negative"): _negative,
    ("lerp",): _interpolated,
    ("to",): _moved,
    ("float",): lambda operand: _cast(operand, torch.float32),
    ("double",): lambda operand: _cast(operand, torch.float64),
    ("half",): lambda operand: _cast(operand, torch.float16),
    ("bfloat16",): lambda operand: _cast(operand, torch.bfloat16),
    ("chunk",): _chunk,
    ("split",): _split,
    ("unbind",): lambda operand, dim=0: _parts(lambda tensor: tensor.unbind(dim), operand),
}
_VIEWS = (
    *("__getitem__", "flatten", "movedim", "narrow", "permute", "reshape", "select", "squeeze", "transpose"),
    *("unflatten", "unsqueeze", "view"),
)


_OPERATORS = (
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__neg__",
    "__getitem__",
)
"""Which Python calls without keywords."""


def _viewing(name: str) -> Callable[..., Any]:
    return lambda operand, *how: _view(operand, lambda tensor: getattr(tensor, name)(*plain(how)))


def _with_keywords(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule as a method, which computes the tensor for what is said by keywords."""

    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not keywords:
            return rule(self, *arguments)
        if set(keywords) <= {"dim"}:
            return rule(self, *arguments, *keywords.values())
        return getattr(self.computed(), name)(*plain(arguments), **plain(keywords))

    return method


def _install() -> None:
    rules: dict[tuple[str, ...], Callable[..., Any]] = _RULES | {(name,): _viewing(name) for name in _VIEWS}
    for names, rule in rules.items():
        LazyTensor.rules |= dict.fromkeys(_names(*names), rule)
        for name in names:
            for kind in (Traced, Combined, OfHalves):
                if name in _OPERATORS:
                    setattr(kind, name, rule)
                elif name not in vars(kind) and hasattr(Tensor, name):
                    setattr(kind, name, _with_keywords(name, rule))
    Traced.chunk = _halved  # type: ignore[attr-defined]
    setattr(Joined, "__neg__", _negative)  # noqa: B010, mypy knows of no operator that is set
    LazyTensor.rules |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _joined)
    LazyTensor.rules[torch.stack] = _stacked
    taking = _names("chunk", "split", "unbind")
    LazyTensor.take_dim |= {torch.cat, torch.concat, torch.concatenate, torch.stack, *taking}


_install()
