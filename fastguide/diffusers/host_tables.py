"""Keep the tables of a scheduler that counts its steps on the host, as diffusers has made them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .written_tables import outside_of_modes, state_of


@dataclass(slots=True, eq=False)
class HostTables:
    """What diffusers' ``set_timesteps`` has made, on the host, as long as the scheduler has these very tensors."""

    sigmas: Tensor
    timesteps: Tensor
    config: Any
    versions: tuple[Any, ...]
    """Of the sigmas, of the timesteps, and of each in ``further``."""
    sigma_values: tuple[float, ...]
    timestep_values: tuple[float, ...]
    dtype: torch.dtype
    """Of the timesteps."""
    first_steps: dict[float, int]
    """Which step diffusers begins with at a timestep, by its value, where diffusers has been asked."""
    further: tuple[Tensor, ...] = ()
    """The tables that the scheduler's ``_further_tables`` name."""
    host_further: tuple[Tensor, ...] = ()
    """Of their own dtypes."""
    further_values: tuple[tuple[float | None, ...], ...] = ()
    _host_sigmas: Tensor | None = None
    _host_timesteps: Tensor | None = None

    @property
    def host_sigmas(self) -> Tensor:
        """The sigmas in float64."""
        if self._host_sigmas is None:
            with outside_of_modes():
                self._host_sigmas = torch.tensor(self.sigma_values, dtype=torch.float64, device="cpu")
        return self._host_sigmas

    @property
    def host_timesteps(self) -> Tensor:
        """The timesteps, in their own dtype."""
        if self._host_timesteps is None:
            with outside_of_modes():
                self._host_timesteps = torch.tensor(self.timestep_values, dtype=self.dtype, device="cpu")
        return self._host_timesteps

    def sigmas_from(self, begin: int) -> Tensor:
        """Return where the calls from a step on begin, and where the last one ends."""
        return self.host_sigmas[begin : len(self.host_timesteps) + 1]

    def has_timesteps_of(self, other: HostTables) -> bool:
        """Tell whether another's timesteps are these, by value."""
        return self.dtype == other.dtype and self.timestep_values == other.timestep_values

    def says_the_same_as(self, other: HostTables) -> bool:
        """Tell whether another has the same tables, by value, and the very configuration."""
        return self is other or (
            self.config is other.config
            and self.sigma_values == other.sigma_values
            and self.has_timesteps_of(other)
            and self.further_values == other.further_values
        )

    @property
    def fall(self) -> bool:
        """Whether the sigmas fall, or rise, at every step but perhaps the last."""
        steps = self.host_sigmas[: len(self.host_timesteps)].diff()
        return bool((steps < 0).all()) or bool((steps > 0).all())


def on_host(theirs: Callable[..., None]) -> Any:
    """Return diffusers' ``set_timesteps`` of a scheduler, which makes its tables on the host, and then moves them."""

    place = list(inspect.signature(theirs).parameters).index("device") - 1  # without self

    @functools.wraps(theirs)
    def set_timesteps(self: Any, *arguments: Any, **options: Any) -> None:
        device = options.pop("device", None)
        if len(arguments) > place:
            device, arguments = arguments[place], (*arguments[:place], None, *arguments[place + 1 :])
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # so that torch counts who writes to the tables
                theirs(self, *arguments, **options)
                self._tables_are_set(device)
        else:
            theirs(self, *arguments, **options)
            self._tables_are_set(device)

    return set_timesteps


def read_tables(scheduler: Any) -> HostTables:
    """Read the scheduler's tables, which waits for a device that they are on."""
    sigmas, timesteps = getattr(scheduler, scheduler._levels_in), scheduler.timesteps
    further: tuple[Tensor, ...] = ()
    if scheduler._further_tables:
        further = tuple([getattr(scheduler, name) for name in scheduler._further_tables])
    versions = state_of(sigmas), state_of(timesteps), *map(state_of, further)
    before: HostTables | None = scheduler._host
    if before is not None and sigmas is before.sigmas and versions[0] == before.versions[0] is not None:
        sigma_values = before.sigma_values
    else:
        sigma_values = tuple(sigmas.tolist())
    told = sigmas, timesteps, scheduler._internal_dict, versions, sigma_values, tuple(timesteps.tolist())
    if not further:
        return HostTables(*told, timesteps.dtype, {})
    host_further = tuple([each.detach().to("cpu", copy=True) for each in further])
    return HostTables(*told, timesteps.dtype, {}, further, host_further, tuple(map(_comparable, host_further)))


def _comparable(table: Tensor) -> tuple[float | None, ...]:
    """Return the values of a table; ``None`` for NaN, which equals nothing, and which DPM2's have where they end."""
    return tuple([None if value != value else value for value in table.tolist()])


def host_tables(scheduler: Any) -> HostTables:
    """Return the scheduler's tables on the host, read anew where they have been changed by hand."""
    host = scheduler._host
    if host is None or not _is_current(host, scheduler):
        with outside_of_modes():
            host = scheduler._host = read_tables(scheduler)
    found: HostTables = host
    return found


def first_step_at(scheduler: Any, host: HostTables, value: float) -> int:
    """Return which step diffusers begins with at one of its timesteps, by its value; diffusers is asked once."""
    found = host.first_steps.get(value)
    if found is None:
        told = host.host_timesteps
        found = scheduler.index_for_timestep(told[host.timestep_values.index(value)], told)
        host.first_steps[value] = found
    return found


def _is_current(host: HostTables, scheduler: Any) -> bool:
    own = scheduler.__dict__
    sigmas, timesteps, versions = host.sigmas, host.timesteps, host.versions
    if own[scheduler._levels_in] is not sigmas or own["timesteps"] is not timesteps:
        return False
    if own["_internal_dict"] is not host.config:
        return False
    if not host.further:
        return (state_of(sigmas), state_of(timesteps)) == versions
    if not all(own[name] is each for name, each in zip(scheduler._further_tables, host.further, strict=True)):
        return False
    return tuple(map(state_of, (sigmas, timesteps, *host.further))) == versions
