"""Make the table of a scheduler's loop, and keep it for later loops over the same steps.

diffusers' ``set_timesteps`` makes its tensors anew for each loop, mostly with the values that they had before. So a
table is found again by these values, and by those of whatever else its rows depend on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..solvers import ROW_COLUMNS, StepTable
from .host_tables import HostTables
from .thresholding import thresholded, why_not_thresholded
from .written_tables import outside_of_modes

_IN_SCALE = ROW_COLUMNS.index("in_scale")
_MOST = 16
"""Tables that a scheduler keeps."""
_CONSTANT = bool, int, float, str, type(None)
"""Types of values that are what they were as long as they are the same objects."""


@dataclass
class LoopTable:
    """The table of a scheduler's loop, or the reason why it has none."""

    config: dict[str, Any]
    state: tuple[Any, ...]
    """What the rows depend on besides the configuration, diffusers' tables and the arguments of ``step``."""
    table: StepTable | None = None
    why_not: str | None = None
    second: StepTable | None = None
    """Whose steps lead to the second tensor that diffusers returns, the predicted x_0 or what is in its place."""
    churned: tuple[bool, ...] = ()
    """At which calls that has a part of the noise, which cannot be drawn again."""
    keeps: tuple[bool, ...] = ()
    """After which calls the sample is kept besides the tensor that is returned, as the next call goes back to it."""
    in_scales: tuple[float, ...] = ()
    """What the scheduler divides or multiplies the model's inputs by, call by call; the table does not."""
    scaling: StepTable | None = None
    """The same table, with that scale."""
    staging: StepTable | None = None
    """``scaling`` on the device, once a loop was asked for the model's input of the very sample that a step returned:
    from then on, steps write that input as well."""
    corrected: Any = None
    """The samples that its calls go on from and do not make, if a scheduler was asked for them."""
    weights: Any = None
    """Those of the predictions that a model's output holds, call by call, of a scheduler whose outputs hold several."""
    like: Any = None
    """What the last step of an earlier loop and those like it have in common, if there was one: see ``step_again``."""
    of_config: Any = None
    """The scheduler's own ``config``, of which this one is a copy."""
    changeable: tuple[str, ...] = ()
    """The names of its entries that may change without being replaced."""

    def is_of(self, config: Any, state: tuple[Any, ...]) -> bool:
        """Tell whether the rows are those of a scheduler's configuration, and of whatever else they depend on."""
        if config is self.of_config:
            same = all(_equal(self.config[name], config[name]) for name in self.changeable)
        else:
            same = _have_same(self.config, config)
        return same and _are_same(self.state, state)

    def stage(self) -> None:
        """Let steps write the model's next input as well, but those that write a second copy of the sample."""
        if self.staging is None and self.table is not None and self.scaling is not None:
            rows = self.scaling.rows.clone()
            rows[torch.tensor(self.keeps, device="cpu"), _IN_SCALE] = 1.0
            self.staging = replace(self.scaling, rows=rows, forms={}).to(self.table.device)


def loop_table(
    scheduler: Any, tables: HostTables, begin: int, arguments: tuple[Any, ...], device: torch.device
) -> LoopTable:
    """Return the table of a loop that begins at a step, for what ``step`` is given and where."""
    with outside_of_modes():
        return _found_or_made(scheduler, tables, begin, arguments, device)


def _found_or_made(
    scheduler: Any, tables: HostTables, begin: int, arguments: tuple[Any, ...], device: torch.device
) -> LoopTable:
    kept: dict[Any, LoopTable] | None = scheduler.__dict__.get("_kept_tables")
    if kept is None:
        kept = scheduler._kept_tables = {}
    config, state = scheduler._internal_dict, tuple([getattr(scheduler, name) for name in scheduler._state])
    values = tables.sigma_values, tables.timestep_values, tables.further_values
    key = (begin, arguments, device, tables.dtype, *values)
    found = kept.get(key)
    if found is None or not found.is_of(config, state):
        kept.pop(key, None)
        while len(kept) >= _MOST:
            del kept[next(iter(kept))]
        found = kept[key] = _made(scheduler, tables, begin, arguments, device, config, state)
        found.of_config = config
        public = [name for name in config if not name.startswith("_")]  # those of diffusers' own say nothing of rows
        found.changeable = tuple([name for name in public if not isinstance(config[name], _CONSTANT)])
    return found


def _made(
    scheduler: Any,
    tables: HostTables,
    begin: int,
    arguments: tuple[Any, ...],
    device: torch.device,
    config: dict[str, Any],
    state: tuple[Any, ...],
) -> LoopTable:
    thresholds = not scheduler._ignores_thresholding
    why_not = scheduler._why_not() or (why_not_thresholded(config) if thresholds else None)
    why_not = why_not or scheduler._why_not_from(begin) or _why_not_levels(scheduler, tables, begin)
    depends = {name: _copied(value) for name, value in config.items()}, tuple(map(_copied, state))
    if why_not is not None:
        return LoopTable(*depends, why_not=why_not)
    made = scheduler._loop_table(tables, begin, *arguments)
    why_not = _why_not_table(made, thresholds and bool(config.get("thresholding")))
    if why_not is not None:
        return LoopTable(*depends, why_not=why_not)
    if thresholds:
        made = thresholded(made, config)
    table = _with_plain_inputs(made).to(device)
    second = None
    if scheduler._output is not None:
        second = _second_table(table, scheduler._second_columns(tables, begin, *arguments))
    columns = table.coefficients()
    churned, goes_back = (tuple((columns[name] != 0).tolist()) for name in ("x0_noise", "out_anchor"))
    keeps = (*goes_back[1:], False)
    in_scales = tuple(scheduler._in_scales(made))
    return LoopTable(*depends, table, None, second, churned, keeps, in_scales, made)


def _why_not_levels(scheduler: Any, tables: HostTables, begin: int) -> str | None:
    """Say what of the levels and timesteps of a loop no row can be made of."""
    told = tables.timestep_values[begin:]
    if scheduler._sigmas_fall and not tables.fall:
        return "sigmas that do not fall"
    if not all(map(isfinite, told)):
        return "timesteps that are not finite"
    of_noise = scheduler._levels_in == "alphas_cumprod" and scheduler.config.prediction_type == "epsilon"
    if of_noise and any(tables.sigma_values[int(t)] == 0 for t in told):
        return "a prediction that says nothing of x_0, at a timestep without any signal"
    return None


def _why_not_table(made: StepTable, thresholds: bool) -> str | None:
    """Say what of a loop its table cannot express, as one of a last step that leaves the sample as it is."""
    if not made.takes_predictions:
        return "a loop that uses no model output"
    columns = made.coefficients()
    through_x0 = any(bool((columns[name] != 0).any()) for name in ("out_x0", "hist_x0"))
    return "thresholding in a loop that does not go through x_0" if thresholds and not through_x0 else None


def _second_table(table: StepTable, second: Mapping[str, Tensor] | None) -> StepTable:
    """Return the table whose steps lead to the second tensor that diffusers returns; ``None``: to x_0.

    It leaves nothing for later ones.
    """
    columns = table.coefficients()
    kept = {name: columns[name] for name in ("x0_scale", "x0_sample", "x0_pred", "clip", "quantile")}
    kept |= {"out_x0": torch.ones_like(kept["x0_scale"])} if second is None else second
    name = f"x_0 of {table.name}"
    made = StepTable.from_columns(table.timesteps_on_host(), kept, undefined=table.undefined, name=name)
    return made.to(table.device)


def _with_plain_inputs(table: StepTable) -> StepTable:
    """Return the table without a gradient, and without a scale of the model's inputs, which pipelines apply."""
    rows = table.rows.clone()
    rows[:, _IN_SCALE] = 1.0
    return replace(table, rows=rows, forms={}, first_in_scale=1.0)


def _copied(value: Any) -> Any:
    """Return a value that stays what it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


def _have_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if list(first) != list(dict.keys(second)):  # an OrderedDict's own are slower; values are compared by place
        return False
    return all(map(is_, first.values(), second.values())) or _are_same(first.values(), second.values())


def _are_same(first: Iterable[Any], second: Iterable[Any]) -> bool:
    return all(one is other or _equal(one, other) for one, other in zip(first, second, strict=True))


def _equal(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, as far as one can tell without knowing of their types."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
        return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return type(one) is type(other) and isinstance(one, (bool, int, float, str, list, tuple)) and bool(one == other)
