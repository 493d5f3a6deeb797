"""Heun's method over sigma: Karras et al. 2022, algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._unscaled_calls import UnscaledCalls, unscaled_calls, unscaled_table
from .begin import begins_anywhere
from .entries import Entry, Form
from .table import StepTable


@begins_anywhere
def heun(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    clip_sample_range: float | None = None,
    sigma_spacing: SigmaSpacing | None = None,
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    timesteps: Tensor | Sequence[float] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    begin: int = 0,
) -> StepTable:
    """Return the steps of Heun's method, which follow the mean of the slopes at both ends (Karras et al. 2022).

    A step makes two model calls: at sigma, and at sigma' where the first call leads. The last step, to sigma 0, is
    Euler's, with one call. The sample is unscaled, as in ``euler``.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        prediction_type: what the model returns: any but ``flow_prediction``.
        clip_sample_range: the predicted x_0 is clipped to ``[-range, range]``; ``None``: not at all.
        sigma_spacing, timestep_spacing, steps_offset, timesteps: as in ``euler``.
        sigmas: where the steps begin and where the last one ends, strictly falling to 0, instead of all that.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table of ``2 * steps - 1`` calls, its timesteps real. Its calls go on from earlier ones: it has
        ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> heun(NoiseSchedule.scaled_linear(), 10, timestep_spacing="trailing")
    StepTable(heun, 10 steps in 19 calls, timesteps 999.0 .. 99.0, device=cpu)
    """
    steps = unscaled_calls(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        sigmas=sigmas,
        sigma_spacing=sigma_spacing,
        begin=begin,
    )
    calls = steps.with_second_calls(steps.sigmas[1:-1], steps.timesteps[1:])
    return heun_table(calls, prediction_type, clip_sample_range)


def heun_table(calls: UnscaledCalls, prediction_type: PredictionType, clip_sample_range: float | None) -> StepTable:
    """Return ``heun`` over any calls: two at each sigma but the first, and the last one's result is at 0."""
    forms, sigma = [], [*calls.sigmas[:1].tolist(), *calls.sigmas[1::2].tolist()]
    for step, (now, after) in enumerate(pairwise(sigma)):
        first = 2 * step
        ratio = after / now  # x' = x + (sigma' - sigma) * (x - x_0) / sigma
        forms.append(Form(sample=ratio).add({first: 1 - ratio}))
        if after > 0:  # x' = x + (sigma' - sigma) * (slope + slope') / 2, where x is (x1 - (1 - ratio) * x_0) / ratio
            q = (after - now) / (2 * after)
            forms.append(Form(anchor=1 - q, sample=q).add({first + 1: -q, first: q}))
    return unscaled_table(
        "heun",
        calls,
        forms,
        Entry.original(calls.levels),
        prediction_type=prediction_type,
        clip_sample_range=clip_sample_range,
    )
