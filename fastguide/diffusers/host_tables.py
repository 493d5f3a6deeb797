"""Keep the tables of a scheduler that counts its steps on the host, as diffusers has made them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .timesteps import version_of


class HostTables(NamedTuple):
    """What diffusers' ``set_timesteps`` has made, on the host, as long as the scheduler has these very tensors."""

    sigmas: Tensor
    timesteps: Tensor
    config: Any
    versions: tuple[int | None, ...]
    """Of the sigmas, of the timesteps, and of each in ``further``."""
    host_sigmas: Tensor
    """float64."""
    host_timesteps: Tensor
    sigma_values: tuple[float, ...]
    timestep_values: tuple[float, ...]
    first_steps: dict[int, int]
    """Which step diffusers begins with at a place of the timesteps, where it has been asked."""
    further: tuple[Tensor, ...] = ()
    """The tables that the scheduler's ``_further_tables`` name."""
    host_further: tuple[Tensor, ...] = ()
    """Of their own dtypes."""
    further_values: tuple[tuple[float | None, ...], ...] = ()

    def sigmas_from(self, begin: int) -> Tensor:
        """Return where the calls from a step on begin, and where the last one ends."""
        return self.host_sigmas[begin : len(self.host_timesteps) + 1]

    def has_timesteps_of(self, other: HostTables) -> bool:
        """Tell whether another's timesteps are these, by value."""
        same = self.host_timesteps.dtype == other.host_timesteps.dtype
        return same and self.timestep_values == other.timestep_values

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
        with torch.inference_mode(False):  # so that torch counts who writes to the tables
            theirs(self, *arguments, **options)
            self._tables_are_set(device)

    return set_timesteps


def read_tables(scheduler: Any) -> HostTables:
    """Read the scheduler's tables, which waits for a device that they are on."""
    sigmas, timesteps = getattr(scheduler, scheduler._levels_in), scheduler.timesteps
    further = tuple([getattr(scheduler, name) for name in scheduler._further_tables])
    versions = tuple(map(version_of, (sigmas, timesteps, *further)))
    host = sigmas.detach().to("cpu", torch.float64, copy=True), timesteps.detach().to("cpu", copy=True)
    sigma_values, timestep_values = (tuple(tensor.tolist()) for tensor in host)
    host_further = tuple([each.detach().to("cpu", copy=True) for each in further])
    further_values = tuple(map(_comparable, host_further))
    return HostTables(
        sigmas, timesteps, scheduler._internal_dict, versions, *host, sigma_values, timestep_values, {},
        further, host_further, further_values,
    )  # fmt: skip


def _comparable(table: Tensor) -> tuple[float | None, ...]:
    """Return the values of a table; ``None`` for NaN, which equals nothing, and which DPM2's have where they end."""
    return tuple([None if value != value else value for value in table.tolist()])


def host_tables(scheduler: Any) -> HostTables:
    """Return the scheduler's tables on the host, read anew where they have been changed by hand."""
    host = scheduler._host
    if host is None or not _is_current(host, scheduler):
        host = scheduler._host = read_tables(scheduler)
    found: HostTables = host
    return found


def _is_current(host: HostTables, scheduler: Any) -> bool:
    own = scheduler.__dict__
    sigmas, timesteps, config, versions = host[:4]
    if own[scheduler._levels_in] is not sigmas or own["timesteps"] is not timesteps:
        return False
    if own["_internal_dict"] is not config:
        return False
    if not host.further:
        return (version_of(sigmas), version_of(timesteps)) == versions
    if not all(own[name] is each for name, each in zip(scheduler._further_tables, host.further, strict=True)):
        return False
    return tuple(map(version_of, (sigmas, timesteps, *host.further))) == versions
