"""Let a solver's table begin at a later step: its first calls cannot go on from calls that are not made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

from torch import Tensor

from .._counts import is_integer
from .table import StepTable

P = ParamSpec("P")


@dataclass(frozen=True)
class Maker:
    """Makes a solver's table again, from another step on."""

    solver: Callable[..., StepTable]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, begin: int) -> StepTable:
        """Return the table from step ``begin`` of this one on."""
        return self.solver(*self.arguments, **{**self.options, "begin": self.options.get("begin", 0) + begin})


def begins_anywhere(solver: Callable[P, StepTable]) -> Callable[P, StepTable]:
    """Keep with a table how its solver, which takes ``begin=``, makes it from a later step on."""

    @functools.wraps(solver)
    def make(*arguments: P.args, **options: P.kwargs) -> StepTable:
        kept = tuple(map(_frozen, arguments)), {name: _frozen(value) for name, value in options.items()}
        call: Callable[..., StepTable] = solver
        return replace(call(*kept[0], **kept[1]), maker=Maker(make, *kept))

    return make


def _frozen(value: Any) -> Any:
    """Return an argument as its caller cannot change it later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return tuple(value)
    return frozenset(value) if isinstance(value, set) else value


def check_begin(begin: int, steps: int) -> None:
    """Refuse a first step that is not one of the steps."""
    if not is_integer(begin):
        raise TypeError(f"begin: expected an integer, got {begin!r}")
    if not 0 <= begin < steps:
        raise ValueError(f"begin: expected a step from 0 to {steps - 1}, got {begin}")
