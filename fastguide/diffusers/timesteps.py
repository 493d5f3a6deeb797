"""Find a timestep's row without waiting for a device; the row's number is the training timestep."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .written_tables import state_of


class HostTimesteps(NamedTuple):
    """The values of a scheduler's ``timesteps``, as long as that is this tensor and nothing is written to it."""

    tensor: Tensor
    values: tuple[int, ...]
    version: Any


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; ``None`` where torch does not count that."""
    return None if tensor.is_inference() else tensor._version


def host_timesteps(scheduler: Any) -> tuple[int, ...]:
    """Return the values of ``timesteps``; they are read from a device only if ``set_timesteps`` did not set them."""
    timesteps, cache = scheduler.timesteps, scheduler._timesteps_cache
    compiling = torch.compiler.is_compiling()
    if cache is None or cache.tensor is not timesteps or not (compiling or cache.version == state_of(timesteps)):
        cache = _cache_timesteps(scheduler, tuple(timesteps.tolist()))
    values: tuple[int, ...] = cache.values
    return values


def move_timesteps(scheduler: Any, device: str | torch.device | None) -> None:
    """Move ``timesteps`` from the host to a device; the host remembers their values."""
    values = host_timesteps(scheduler)
    if device is not None:
        scheduler.timesteps = scheduler.timesteps.to(device)
        _cache_timesteps(scheduler, values)


def _cache_timesteps(scheduler: Any, values: tuple[int, ...]) -> HostTimesteps:
    version = None if torch.compiler.is_compiling() else state_of(scheduler.timesteps)
    cache = scheduler._timesteps_cache = HostTimesteps(scheduler.timesteps, values, version)
    return cache


def row_of(scheduler: Any, timestep: int | Tensor, sample: Tensor) -> int | Tensor:
    """Return a timestep's row: a number if the host can know it without waiting, else an index for the kernel.

    The host knows an int, a tensor on the CPU, and each ``t`` of ``for t in scheduler.timesteps`` on any device, by
    its place in that tensor.

    Args:
        scheduler: one of fastguide's.
        timestep: an int, or an int64 tensor of shape (), (1,) or (batch,).
        sample: x_t, of whose batch and device an index is.

    Raises:
        TypeError, ValueError, IndexError: the timestep is not as described, or on the CPU one that is not trained.
    """
    if not isinstance(timestep, Tensor):
        return _row_of_number(timestep, sample.device)
    dim = timestep.dim()
    if dim and timestep.numel() == 1:  # for every sample, as diffusers takes it
        timestep, dim = timestep.reshape(()), 0
    if timestep.is_floating_point() or dim > 1:
        got = f"{timestep.dtype} of shape {tuple(timestep.shape)}"
        raise TypeError(f"timestep: expected int64 of shape () or (batch,), got {got}")
    if dim:
        _check_timesteps(timestep, len(sample), len(scheduler.alphas_cumprod))
    elif not torch.compiler.is_compiling():
        if timestep.device.type == "cpu":
            return int(timestep)
        place = place_in(scheduler.timesteps, timestep)
        if place is not None:
            return host_timesteps(scheduler)[place]
    return timestep.to(sample.device, torch.int64)


def _row_of_number(timestep: Any, device: torch.device) -> int | Tensor:
    if torch.compiler.is_compiling():  # a number would compile a graph for each timestep
        return torch.full((), timestep, dtype=torch.int64, device=device)
    if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):
        raise TypeError(f"timestep: expected an int or an int64 tensor, got {timestep!r}")
    return operator.index(timestep)


def _check_timesteps(timesteps: Tensor, batch: int, trained: int) -> None:
    """Refuse timesteps that are not one per sample, or that the host can see to be out of range."""
    if len(timesteps) != batch:
        raise ValueError(f"timestep: expected shape () or ({batch},), got {tuple(timesteps.shape)}")
    if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
        for value in timesteps.tolist():
            if not 0 <= value < trained:
                raise IndexError(f"timestep: expected 0 to {trained - 1}, got {value}")


def place_of(timesteps: Tensor, on_host: Sequence[float], timestep: Any) -> int | None:
    """Return the place of a timestep, as far as the host knows it; ``None``: it does not, or there is none.

    Args:
        timesteps: the scheduler's.
        on_host: their values.
        timestep: a number, or a tensor of one element: one of ``timesteps``, or on the host.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            return None
        place = place_in(timesteps, timestep)
        if place is not None or timestep.device.type != "cpu":
            return place
    value = timestep.item() if isinstance(timestep, Tensor) else timestep
    return on_host.index(value) if value in on_host else None


def value_of(timesteps: Tensor, on_host: Sequence[float], timestep: Any) -> float | None:
    """Return a timestep's value, as far as the host knows it; as ``place_of``, but it need not be one of them."""
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            return None
        if timestep.is_cpu and not torch._C._len_torch_dispatch_stack():  # in a mode, it may be without a value
            return timestep.item()
        place = place_in(timesteps, timestep)
        return None if place is None else on_host[place]
    return timestep if type(timestep) in (int, float) else None


def place_in(timesteps: Tensor, timestep: Tensor) -> int | None:
    """Return which element of ``timesteps`` a tensor of one element is a view of; ``None``: of none."""
    if timestep.untyped_storage()._cdata != timesteps.untyped_storage()._cdata:
        return None
    if timestep.dtype != timesteps.dtype:
        return None
    distance = int(timestep.storage_offset() - timesteps.storage_offset())
    place, rest = divmod(distance, timesteps.stride(0) or 1)
    return place if rest == 0 and 0 <= place < timesteps.numel() else None  # len() takes as long as all of the above
