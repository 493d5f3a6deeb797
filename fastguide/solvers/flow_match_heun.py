"""Heun's method for flow matching: Karras et al. 2022, algorithm 2, along the path of Lipman et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.flow import FlowSchedule, FlowSteps
from ..schedules.levels import Levels
from ..schedules.predictions import PredictionType
from ._columns import NO_VARIANCE, inpainting_columns, x0_columns
from ._unscaled import Churn, churn
from .begin import begins_anywhere, check_begin
from .entries import Entry, Form, history_columns, history_gradients
from .table import StepTable


@begins_anywhere
def flow_match_heun(
    schedule: FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "flow_prediction",
    sigmas: Tensor | Sequence[float] | None = None,
    timesteps: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    begin: int = 0,
) -> StepTable:
    """Return the steps of Heun's method along a flow, which follow the mean of the velocities at both ends.

    A step makes two model calls, at sigma and at sigma': ``x' = x + (sigma' - sigma) * (m + m') / 2``. The last step,
    to sigma 0, is Euler's, with one call.

    Args:
        schedule: the flow's sigmas.
        num_inference_steps: number of steps, if ``sigmas`` or ``timesteps`` do not say them.
        prediction_type: what the model returns.
        sigmas, timesteps, mu: as in ``FlowSchedule.steps``.
        s_churn, s_tmin, s_tmax, s_noise: as in ``euler``; the churn is divided among the model calls, and each step
            gets a call's share.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table of ``2 * steps - 1`` calls, its timesteps real. Its calls go on from earlier ones: it has
        ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon or score at sigma = 1, where there is no signal.

    >>> from fastguide import FlowSchedule
    >>> flow_match_heun(FlowSchedule(), sigmas=[1.0, 0.75, 0.5, 0.25])
    StepTable(flow_match_heun, 4 steps in 7 calls, timesteps 1000.0 .. 250.0, device=cpu)
    """
    if not isinstance(schedule, FlowSchedule):
        raise TypeError(f"schedule: expected a FlowSchedule, got {type(schedule).__name__}")
    if schedule.invert_sigmas:
        raise ValueError("schedule: expected a flow whose sigmas fall, got one with invert_sigmas")
    every = schedule.steps(num_inference_steps, sigmas=sigmas, timesteps=timesteps, mu=mu)
    check_begin(begin, len(every.timesteps))
    visited = torch.cat([_both_ends(every.sigmas[:-1]), every.sigmas[-1:]])
    churned = churn(visited, s_churn, s_tmin, s_tmax, s_noise)
    first_call = 2 * begin
    rest = Churn(churned.sigmas[first_call:], churned.noise[first_call:])
    return flow_match_heun_table(
        FlowSteps(visited[first_call:], _both_ends(every.timesteps)[first_call:]), rest, prediction_type
    )


def flow_match_heun_table(
    calls: FlowSteps, churned: Churn, prediction_type: PredictionType = "flow_prediction"
) -> StepTable:
    """Return ``flow_match_heun`` over any calls: two at each sigma but the first, and the last one's result is at 0."""
    visited, told = calls
    hats, noises = (values.tolist() for values in churned)
    levels = Levels.flow_matching(visited[:-1])
    forms, sigma = [], visited.tolist()
    for first in range(0, len(told), 2):
        now, hat, after = sigma[first], hats[first], sigma[first + 1]
        moved = now / hat * (after - hat)  # x1 = x + noise + (sigma' - hat) * m * sigma / hat
        forms.append(Form(sample=1.0, noise=noises[first]).add({first: moved}))
        if after > 0:
            forms.append(Form(anchor=1.0).add({first: -moved / 2, first + 1: (after - hat) / 2}))
    columns = x0_columns(prediction_type, levels, None, told, None)
    columns |= history_columns(forms, Entry.slope(levels))
    noise = columns["out_noise"]
    columns["x0_noise"] = noise * columns["x0_scale"] * columns["x0_sample"]
    variance = noise.square() if bool((noise > 0).any()) else NO_VARIANCE
    return StepTable.from_columns(
        told,
        columns | inpainting_columns(Levels.flow_matching(visited[1:])),
        gradients=history_gradients(columns, levels, told, variance),
        levels=levels,
        completes_step=[call % 2 == 1 or call == len(told) - 1 for call in range(len(told))],
        name="flow_match_heun",
    )


def _both_ends(values: Tensor) -> Tensor:
    """Return the values of the calls: the first step's once, and the others' twice."""
    return torch.cat([values[:1], values[1:].repeat_interleave(2)])
