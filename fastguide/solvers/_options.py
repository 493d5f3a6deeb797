"""Checks of solvers' options, which name the option, what was expected and what came."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from .._counts import is_integer


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse what is not one of the values of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {get_args(choices)}, got {value!r}")


def check_order(name: str, order: int, highest: int, where: str = "") -> None:
    """Refuse an order that a solver has not; ``where``: which solver has no higher one."""
    if not is_integer(order) or not 1 <= order <= highest:
        raise ValueError(f"{name}: expected 1 to {highest}{where}, got {order!r}")


def check_flags(**flags: bool) -> None:
    """Refuse what is not True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def check_idle(beside: str, **options: tuple[object, object]) -> None:
    """Refuse options that would do nothing beside another: each a value, and the default that it has to be."""
    for name, (value, default) in options.items():
        if isinstance(value, Tensor) or value != default:
            raise ValueError(f"{name}: expected {default!r} with {beside}, got {value!r}")
