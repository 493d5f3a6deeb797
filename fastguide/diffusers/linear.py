"""Say which operations of torch's leave traced outputs traced: those of ``sums`` and ``views``.

Whatever else is asked for computes the tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .halves import OfHalves, difference, guided, scaled
from .joined import Joined
from .lazy_tensor import LazyTensor, plain
from .sums import cast, interpolated, negative, product, total
from .traced import Combined, Traced
from .views import chunk, halved, joined, parts_of, split, stacked, view

# ---- torch's functions, and Python's operators ----


def _names(*names: str) -> list[Any]:
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


def _moved(operand: Any, *arguments: Any) -> Any:
    """Return ``Tensor.to`` with these arguments."""
    if len(arguments) == 1 and isinstance(arguments[0], torch.dtype):
        return cast(operand, arguments[0])
    if len(arguments) == 1 and isinstance(arguments[0], (str, torch.device)):
        same = operand.like().device == torch.device(arguments[0])
        return operand if same else plain(operand).to(*arguments)
    return plain(operand).to(*plain(arguments))


def _add(first: Any, second: Any) -> Any:
    made = guided(first, second) if type(second) is OfHalves else guided(second, first)
    return total(operator.add, first, second, 1.0) if made is None else made


def _sub(first: Any, second: Any) -> Any:
    made = difference(first, second)
    return total(operator.sub, first, second, -1.0) if made is None else made


def _mul(first: Any, second: Any) -> Any:
    made = scaled(first, second) if type(second) is OfHalves else scaled(second, first)
    return product(operator.mul, first, second) if made is None else made


def _div(first: Any, second: Any) -> Any:
    return product(operator.truediv, first, second, invert=True)


_RULES: dict[tuple[str, ...], Callable[..., Any]] = {
    ("add", "__add__"): _add,
    ("__radd__",): lambda first, second: _add(second, first),
    ("sub", "__sub__", "subtract"): _sub,
    ("__rsub__",): lambda first, second: _sub(second, first),
    ("mul", "__mul__", "multiply"): _mul,
    ("__rmul__",): lambda first, second: _mul(second, first),
    ("div", "__truediv__", "divide", "true_divide"): _div,
    ("neg", "__neg__", "negative"): negative,
    ("lerp",): interpolated,
    ("to",): _moved,
    ("float",): lambda operand: cast(operand, torch.float32),
    ("double",): lambda operand: cast(operand, torch.float64),
    ("half",): lambda operand: cast(operand, torch.float16),
    ("bfloat16",): lambda operand: cast(operand, torch.bfloat16),
    ("chunk",): chunk,
    ("split",): split,
    ("unbind",): lambda operand, dim=0: parts_of(lambda tensor: tensor.unbind(dim), operand),
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
    return lambda operand, *how: view(operand, lambda tensor: getattr(tensor, name)(*plain(how)))


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
    Traced.chunk = halved  # type: ignore[attr-defined]
    setattr(Joined, "__neg__", negative)  # noqa: B010, mypy knows of no operator that is set
    LazyTensor.rules |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), joined)
    LazyTensor.rules[torch.stack] = stacked
    taking = _names("chunk", "split", "unbind")
    LazyTensor.take_dim |= {torch.cat, torch.concat, torch.concatenate, torch.stack, *taking}


_install()
