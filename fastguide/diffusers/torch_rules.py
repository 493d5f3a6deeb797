"""Give traced outputs their operators and methods, and torch's functions their rules for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import formula_rules
from .decisions import compared
from .formula import PRODUCT, Formula
from .halves import OfHalves, difference, guided, scaled
from .joined import Joined
from .known import Known, known, unknown
from .lazy_tensor import LazyTensor, plain
from .sums import beyond, cast, interpolated, negative, product, total
from .traced import Combined, Traced
from .views import chunk, cloned, halved, joined, parts_of, split, stacked, view


def _names(*names: str) -> list[Any]:
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


def _moved(operand: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return ``Tensor.to`` with these arguments: what stays on its device is cast in the step."""
    given = [*arguments, *keywords.values()]
    dtypes = [each for each in given if isinstance(each, torch.dtype)]
    devices = [torch.device(each) for each in given if isinstance(each, (str, torch.device))]
    known = len(dtypes) < 2 and len(devices) < 2 and len(dtypes) + len(devices) == len(given)
    if isinstance(operand, LazyTensor) and known and keywords.keys() <= {"dtype", "device"}:
        here = operand.device
        if all(device == here for device in devices):
            return _cast(operand, dtypes[0]) if dtypes else operand
    return plain(operand, "to").to(*plain(arguments, "to"), **plain(keywords, "to"))


def _cast(operand: Any, dtype: torch.dtype) -> Any:
    return operand if operand.dtype == dtype else _as_dtype(operand, dtype)


_as_dtype = known(cast)


def _typed_as(operand: Any, other: Any) -> Any:
    """Return ``Tensor.type_as``."""
    return _moved(operand, other.device, other.dtype)


def _of_the_kind(name: str) -> Callable[..., Any]:
    """Return the rule of a function that asks for no values, but for a shape, dtype and device, as ``zeros_like``."""

    def rule(operand: Any, *arguments: Any, **keywords: Any) -> Any:
        if not isinstance(operand, LazyTensor):  # what fills it is a part of an output, full_like's value
            return getattr(torch, name)(operand, *plain(arguments, name), **plain(keywords, name))
        if keywords.get("dtype") is None:
            keywords["dtype"] = operand.dtype
        return getattr(torch, name)(operand.like(), *plain(arguments, name), **plain(keywords, name))

    return rule


def _add(first: Any, second: Any) -> Any:
    made = guided(first, second) if type(second) is OfHalves else guided(second, first)
    return _sum(first, second) if made is None else made


@known
def _sum(first: Any, second: Any) -> Any:
    if type(first) is Formula or type(second) is Formula:
        return beyond(operator.add, first, second)
    return total(operator.add, first, second, 1.0)


def _sub(first: Any, second: Any) -> Any:
    made = difference(first, second)
    return _difference(first, second) if made is None else made


@known
def _difference(first: Any, second: Any) -> Any:
    if type(first) is Formula or type(second) is Formula:
        return beyond(operator.sub, first, second)
    return total(operator.sub, first, second, -1.0)


def _mul(first: Any, second: Any) -> Any:
    made = scaled(first, second) if type(second) is OfHalves else scaled(second, first)
    return _product(first, second) if made is None else made


def _multiplied(second: Any, first: Any) -> Any:
    """Return ``first * second``, as the method of the second."""
    made = scaled(first, second)
    return _product(first, second) if made is None else made


@known
def _product(first: Any, second: Any) -> Any:
    if type(first) is Formula or type(second) is Formula:
        return beyond(operator.mul, first, second)
    return product(operator.mul, first, second)


@known
def _div(first: Any, second: Any) -> Any:
    if type(first) is Formula or type(second) is Formula:
        return beyond(operator.truediv, first, second)
    return product(operator.truediv, first, second, invert=True)


_ARITHMETIC: dict[tuple[str, ...], Callable[..., Any]] = {
    ("add", "__add__"): _add,
    ("__radd__",): lambda first, second: _add(second, first),
    ("sub", "__sub__", "subtract"): _sub,
    ("__rsub__",): lambda first, second: _sub(second, first),
    ("mul", "__mul__", "multiply"): _mul,
    ("__rmul__",): _multiplied,
    ("div", "__truediv__", "divide", "true_divide"): _div,
    ("__rtruediv__", "__rdiv__"): lambda first, second: _div(second, first),
    ("to",): _moved,
    ("float",): lambda operand: _cast(operand, torch.float32),
    ("double",): lambda operand: _cast(operand, torch.float64),
    ("half",): lambda operand: _cast(operand, torch.float16),
    ("bfloat16",): lambda operand: _cast(operand, torch.bfloat16),
    ("type_as",): _typed_as,
}
"""Rules that take what is known as it is."""
_RULES: dict[tuple[str, ...], Callable[..., Any]] = {
    ("neg", "__neg__", "negative"): negative,
    ("lerp",): interpolated,
    ("chunk",): chunk,
    ("split",): split,
    ("unbind",): lambda operand, dim=0: parts_of(lambda tensor: tensor.unbind(dim), operand, "unbind"),
    ("clone",): cloned,
    ("pow", "__pow__"): formula_rules.power,
    ("square",): lambda operand: formula_rules.power(operand, 2),
    ("sqrt",): formula_rules.of_number("sqrt"),
    ("exp",): formula_rules.of_number("exp"),
    ("minimum",): formula_rules.of_two_numbers("minimum"),
    ("maximum",): formula_rules.of_two_numbers("maximum"),
    ("clamp", "clip"): formula_rules.clamped,
    ("clamp_min",): lambda operand, least: formula_rules.clamped(operand, least),
    ("clamp_max",): lambda operand, most: formula_rules.clamped(operand, None, most),
    ("gt", "__gt__", "greater"): compared("gt"),
    ("ge", "__ge__", "greater_equal"): compared("ge"),
    ("lt", "__lt__", "less"): compared("lt"),
    ("le", "__le__", "less_equal"): compared("le"),
    ("ones_like",): formula_rules.ones,
    ("std",): formula_rules.reduction(
        "std", "std", ("dim", "unbiased", "keepdim"), {"unbiased": (True, None), "correction": (1,)}
    ),
    ("norm",): formula_rules.reduction(
        "norm", "norm", ("p", "dim", "keepdim"), {"p": (2, "fro", None), "dtype": (None,), "out": (None,)}
    ),
    ("sum",): formula_rules.reduction("sum", "sum", ("dim", "keepdim"), {"dtype": (None,)}, PRODUCT),
}
_OF_THE_KIND = "empty_like", "full_like", "rand_like", "randn_like", "zeros_like"
_RULES |= {(name,): _of_the_kind(name) for name in _OF_THE_KIND}
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
    "__rtruediv__",
    "__pow__",
    "__neg__",
    "__gt__",
    "__ge__",
    "__lt__",
    "__le__",
    "__getitem__",
)
"""Which Python calls without keywords."""


_ANY_KEYWORDS = frozenset(("clamp", "clip", "clone", "norm", "ones_like", "std", "sum", "to", *_OF_THE_KIND))
"""Whose rules see to their keywords."""


_KNOWN_AGAIN = frozenset(
    (
        *("clamp", "clamp_max", "clamp_min", "exp", "maximum", "minimum", "neg", "norm", "ones_like", "pow", "sqrt"),
        *("square", "std", "sum"),
    )
)
"""Whose results are known again, as those of the four operations of arithmetic and casts are, which see to it."""


def _viewing(name: str) -> Callable[..., Any]:
    return lambda operand, *how: view(operand, name, how)


def _with_keywords(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule as a method, which computes the tensor for what is said by keywords."""
    if name in _ANY_KEYWORDS:
        return lambda self, *arguments, **keywords: rule(self, *arguments, **keywords)

    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not keywords:
            return rule(self, *arguments)
        if set(keywords) <= {"dim"}:
            return rule(self, *arguments, *keywords.values())
        return getattr(self.computed(name), name)(*plain(arguments, name), **plain(keywords, name))

    return method


def _of_made(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule that gets what its first operand was made as, if that is one that is known."""
    return lambda first, *operands, **keywords: rule(unknown(first), *operands, **keywords)


def _install() -> None:
    for names, rule in _ARITHMETIC.items():
        _install_rule(names, rule, rule)
    for names, rule in _RULES.items():
        again = known(rule)
        _install_rule(names, *((rule, _of_made(rule)) if _KNOWN_AGAIN.isdisjoint(names) else (again, again)))
    for name in _VIEWS:
        rule = _viewing(name)
        again = known(rule)
        _install_rule((name,), rule, again)
        for kind in (Combined, Formula):
            setattr(kind, name, again if name in _OPERATORS else _with_keywords(name, again))
    Traced.chunk = halved  # type: ignore[attr-defined]
    setattr(Joined, "__neg__", negative)  # noqa: B010, mypy knows of no operator that is set
    LazyTensor.rules |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), joined)
    LazyTensor.rules[torch.stack] = stacked
    LazyTensor.rules[torch.nn.functional.normalize] = known(formula_rules.normalized)
    LazyTensor.rules[torch.linalg.vector_norm] = known(
        formula_rules.reduction(
            "linalg.vector_norm", "norm", ("ord", "dim", "keepdim"), {"ord": (2,), "dtype": (None,), "out": (None,)}
        )
    )
    LazyTensor.take_keywords |= {torch.nn.functional.normalize, torch.linalg.vector_norm, *_names(*_ANY_KEYWORDS)}
    taking = _names("chunk", "split", "unbind")
    LazyTensor.take_dim |= {torch.cat, torch.concat, torch.concatenate, torch.stack, *taking}


def _install_rule(names: tuple[str, ...], rule: Callable[..., Any], of_known: Callable[..., Any]) -> None:
    """Make a rule that of tensors' methods of these names, and another one that of torch's functions and of Knowns."""
    LazyTensor.rules |= dict.fromkeys(_names(*names), of_known)
    for name in names:
        for kind in (Traced, Combined, OfHalves, Formula, Known):
            own = of_known if kind is Known else rule
            if name in _OPERATORS:
                setattr(kind, name, own)
            elif name not in vars(kind) and hasattr(Tensor, name):
                setattr(kind, name, _with_keywords(name, own))


_install()
