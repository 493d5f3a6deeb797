"""Keep ``alphas_cumprod`` on the host, where rows are made, in schedulers whose methods would move it to a device."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .noising import noised_by_timestep
from .written_tables import state_of


class _AlphasCopy(NamedTuple):
    """``alphas_cumprod`` on the host, and a copy of it on a device."""

    host: Tensor
    version: Any
    device: Tensor


class HostAlphas:
    """Mix this into schedulers whose methods would move ``alphas_cumprod`` to a device for good."""

    alphas_cumprod: Tensor
    _alphas_copy: _AlphasCopy | None = None

    def _with_alphas_on_device(self, name: str, tensor: Tensor, *arguments: Any) -> Tensor:
        """Call diffusers' method of this name with ``alphas_cumprod`` on the tensor's device."""
        alphas, copied = self.alphas_cumprod, self._alphas_copy
        version, on = state_of(alphas), None if copied is None else copied.device.device
        if copied is None or copied.host is not alphas or copied.version != version or on != tensor.device:
            copied = self._alphas_copy = _AlphasCopy(alphas, version, alphas.to(tensor.device))
        self.alphas_cumprod = copied.device
        try:
            result: Tensor = getattr(super(), name)(tensor, *arguments)
        finally:
            self.alphas_cumprod = alphas  # on the host, where rows are computed
        return result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise as diffusers does, in one pass where the kernel serves; leave ``alphas_cumprod`` where it is."""

        def formula() -> Any:
            return getattr(super(HostAlphas, self), "add_noise").__func__  # noqa: B009

        done = noised_by_timestep(self, formula, original_samples, noise, timesteps)
        if done is not None:
            return done
        return self._with_alphas_on_device("add_noise", original_samples, noise, timesteps)


class HostAlphasOfVelocity(HostAlphas):
    """The same for schedulers that have ``get_velocity``."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity as diffusers does, but leave ``alphas_cumprod`` where it is."""
        return self._with_alphas_on_device("get_velocity", sample, noise, timesteps)
