"""Tables of unscaled samples, x = x_0 + sigma * epsilon, whose calls go on from earlier ones, one or two a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._columns import NO_VARIANCE, x0_columns
from ._unscaled import init_noise_sigma, loop_columns, schedule_steps
from .begin import check_begin
from .entries import Entry, Form, history_columns, history_gradients
from .table import StepTable


class UnscaledCalls(NamedTuple):
    """The model calls of a solver, from its first step on: float64 on the host."""

    sigmas: Tensor
    """Shape (calls + 1,), falling to 0: the sigma of each call's sample, and of the last one's result."""
    timesteps: Tensor
    """Shape (calls,), real: what the model is told."""
    init_noise_sigma: float
    """The standard deviation of the first sample where it is noise alone."""
    completes_step: tuple[bool, ...]
    """For each call, whether a step is complete after it."""

    @property
    def levels(self) -> Levels:
        """The levels of the calls' samples."""
        return Levels.variance_exploding(self.sigmas[:-1])

    def with_second_calls(self, sigmas: Tensor, timesteps: Tensor) -> UnscaledCalls:
        """Return two calls for each step but the last: where it begins, and at a second sigma."""
        begins, told = self.sigmas[:-1], self.timesteps
        between = torch.stack([begins[:-1], sigmas], 1).flatten()
        between_told = torch.stack([told[:-1], timesteps], 1).flatten()
        return UnscaledCalls(
            torch.cat([between, self.sigmas[-2:]]),
            torch.cat([between_told, told[-1:]]),
            self.init_noise_sigma,
            (False, True) * len(sigmas) + (True,),
        )


def unscaled_calls(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    *,
    timestep_spacing: TimestepSpacing,
    steps_offset: int,
    timesteps: Tensor | Sequence[float] | None,
    sigmas: Tensor | Sequence[float] | None,
    sigma_spacing: SigmaSpacing | None,
    begin: int,
) -> UnscaledCalls:
    """Return one call for each step of a noise schedule, as ``heun`` describes them."""
    steps = schedule_steps(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        sigmas=sigmas,
        sigma_spacing=sigma_spacing,
    )
    if steps.sigmas[-1] != 0:
        raise ValueError(f"sigmas: expected 0 at the end, got {steps.sigmas[-1].item():.4g}")
    check_begin(begin, len(steps.timesteps))
    first = 1.0 if begin else init_noise_sigma(steps, timestep_spacing)
    told = steps.timesteps[begin:]
    return UnscaledCalls(steps.sigmas[begin:], told, first, (True,) * len(told))


def unscaled_table(
    name: str,
    calls: UnscaledCalls,
    forms: Sequence[Form],
    entry: Entry,
    *,
    prediction_type: PredictionType,
    clip_sample_range: float | None = None,
) -> StepTable:
    """Return the table of these forms, with what all solvers of unscaled samples have in common."""
    columns = x0_columns(prediction_type, calls.levels, clip_sample_range, calls.timesteps, None)
    columns |= history_columns(forms, entry)
    loop, first_in_scale = loop_columns(calls.sigmas)
    noise = columns["out_noise"]
    variance = noise.square() if bool((noise > 0).any()) else NO_VARIANCE
    return StepTable.from_columns(
        calls.timesteps,
        columns | loop,
        gradients=history_gradients(columns, calls.levels, calls.timesteps, variance),
        levels=calls.levels,
        first_in_scale=first_in_scale,
        init_noise_sigma=calls.init_noise_sigma,
        completes_step=calls.completes_step,
        name=name,
    )
