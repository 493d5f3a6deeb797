"""Give schedulers that count their steps a ``step``: one class for each signature that diffusers' have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solvers import StepTable
from ..solvers._unscaled import Churn, churn
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes, NoiseRule, of_the_model
from .guidance_arguments import Scale
from .host_tables import HostTables, host_tables
from .noise import Generators

NOT_AT = "a timestep that is not the one of the next step"
Draws = Callable[[StepTable, int], bool] | bool
"""Whether diffusers draws noise at a call of a loop's table, also where it does not use it."""


def as_number(value: Any) -> Any:
    """Return an option of a step that rows depend on as a number; for one on a device, this waits for the device."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


class StepWithoutNoise(CountedStep):
    """Mix this into a deterministic scheduler."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale)
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, return_dict)  # type: ignore[misc]


class StepWithGenerator(CountedStep):
    """Mix this into a scheduler whose steps may draw noise."""

    _noise_dtype: NoiseRule = "model"
    """In which diffusers draws."""

    def _draws(self) -> Draws:
        return True

    def _predicted(self, output: Any) -> Any:
        """Return what the scheduler takes of a model's output."""
        return output

    def _why_not_at(self, timestep: Any) -> str | None:
        """Say why a step from a timestep is left to diffusers; ``None``: it is not."""
        return None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        model_output, draws, reason = self._predicted(model_output), self._draws(), self._why_not_at(timestep)
        if reason is None:
            drawing = None if draws is False else Drawing(generator, draws, self._noise_dtype)
            done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale, drawing)
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale, reason)
        return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]


class StepWithChurn(CountedStep):
    """Mix this into a scheduler whose steps may begin with noise (Karras et al. 2022, algorithm 2)."""

    _default_arguments = (0.0, 0.0, float("inf"), 1.0)
    _refuses_integers = True

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_model(sample, model)

    def _churn(self, tables: HostTables, begin: int, arguments: tuple[float, float, float, float]) -> Churn:
        """Return the churn of the calls from a step on; it is divided among all calls of diffusers' table."""
        every, calls = churn(tables.host_sigmas, *arguments), len(tables.host_timesteps)
        return Churn(every.sigmas[begin:calls], every.noise[begin:calls])

    def _churns_at(self, call: int, begin: int) -> int:
        """Return the place of the sigma that says whether a call of a loop draws."""
        return begin + call

    def _draws_between(self, least: float, most: float, table: StepTable, call: int) -> bool:
        """Tell whether a call of a loop draws, where those of sigmas from ``least`` to ``most`` do."""
        assert self._counted is not None
        return least <= host_tables(self).sigma_values[self._churns_at(call, self._counted.begin)] <= most

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        arguments, drawing = (s_churn, s_tmin, s_tmax, s_noise), None
        if Tensor in map(type, arguments):
            arguments = tuple(map(as_number, arguments))
        if s_churn > 0:
            drawing = Drawing(generator, functools.partial(self._draws_between, s_tmin, s_tmax))
        done = counted_step(self, arguments, model_output, timestep, sample, return_dict, guidance_scale, drawing)
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)  # type: ignore[misc]
