"""Begin a solver's table at a later step: its first calls cannot go on from calls that are not made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._counts import is_integer
from ..schedules.levels import Levels
from .table import StepTable

P = ParamSpec("P")

_PADDED: WeakKeyDictionary[StepTable, dict[int, tuple[StepTable, int]]] = WeakKeyDictionary()  # a table takes a while


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
        return replace(call(*kept[0], **kept[1]), maker=Maker(make, *kept), begin=kept[1].get("begin", 0))

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


def padded_to_begin_at(table: StepTable, step: int) -> tuple[StepTable, int]:
    """Return the table with which to begin at a later step, and the model call at which that begins.

    It has as many calls as this one, so that those that are made keep their numbers; those before are not to be made.
    It is this one, unless calls go on from earlier ones: then those from the step on are made anew, as if none came
    before them. A solver whose first step takes a call more than the others (``pndm``) does so from there on.

    Raises:
        ValueError: nobody knows how to make them; build a table with the solver's ``begin=``.

    >>> from fastguide import NoiseSchedule, dpm_solver
    >>> later, call = padded_to_begin_at(dpm_solver(NoiseSchedule.linear(), 10), 4)
    >>> len(later), call
    (10, 4)
    """
    check_begin(step, table.steps)
    if step == 0:
        return table, 0
    if not table.history_slots:
        ends = [call + 1 for call, completes in enumerate(table.completes_step) if completes]
        return table, ends[step - 1]
    if table.maker is None:
        raise ValueError(
            f"table: expected a whole one of its solver's, as {table.name} goes on from earlier calls; or one that the "
            f"solver makes with begin={table.begin + step}"
        )
    known = _PADDED.setdefault(table, {})
    if step not in known:
        last = table.maker(step)
        known[step] = _with_last(table, last), len(table) - len(last)
    return known[step]


def _with_last(table: StepTable, last: StepTable) -> StepTable:
    """Return the table with its last rows exchanged for those of another one."""
    kept = len(table) - len(last)
    forms: dict[str, Tensor | str] = {}
    for form, values in last.forms.items():
        ours = table.forms.get(form)
        if isinstance(values, Tensor):
            forms[form] = torch.cat([(ours if isinstance(ours, Tensor) else table.rows)[:kept], values])
        else:  # a form that has no use in the last rows alone changes nothing there
            forms[form] = torch.cat([ours[:kept], last.rows]) if isinstance(ours, Tensor) else values
    levels = None
    if table.levels is not None and last.levels is not None:
        pairs = zip(table.levels, last.levels, strict=True)
        levels = Levels(*(torch.cat([before[:kept], after]) for before, after in pairs))
    return replace(
        table,
        timesteps=torch.cat([table.timesteps_on_host(slice(kept)), last.timesteps_on_host()]),
        rows=torch.cat([table.rows[:kept], last.rows]),
        forms=forms,
        levels=levels,
        completes_step=(*table.completes_step[:kept], *last.completes_step),
        maker=None,
    )
