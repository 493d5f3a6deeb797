"""Euler's method for flow matching, deterministic and stochastic: Lipman et al. 2023, Esser et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.flow import FlowSchedule, FlowSteps
from ..schedules.levels import Levels
from ..schedules.predictions import PredictionType
from ._columns import NO_VARIANCE, gradient_forms, inpainting_columns, x0_columns, x0_shift
from .table import StepTable


def flow_match_euler(
    schedule: FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    stochastic: bool = False,
    prediction_type: PredictionType = "flow_prediction",
    sigmas: Tensor | Sequence[float] | None = None,
    timesteps: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
) -> StepTable:
    """Return Euler's steps along a flow, ``x' = x + (sigma' - sigma) * velocity`` (Lipman et al. 2023, eq. 1 and 23).

    Stochastic, a step predicts x_0 and noises it to the next level with new noise:
    ``x' = (1 - sigma') * x_0 + sigma' * z``, as the multistep sampling of consistency models does (Song et al. 2023).

    Args:
        schedule: the flow's sigmas: shifts, spacing, terminal value.
        num_inference_steps: number of steps, if ``sigmas`` or ``timesteps`` do not say them.
        stochastic: whether each step draws new noise.
        prediction_type: what the model returns; with any but ``flow_prediction`` the velocity is ``(x - x_0) / sigma``.
        sigmas, timesteps, mu: as in ``FlowSchedule.steps``.

    Returns:
        The step table, its timesteps real. Where the schedule's sigmas are inverted, the model's velocity is that of
        its own time, ``x_0 - epsilon``. A gradient has no use in a table whose first sigma is 1, where a shift of
        epsilon moves x_0 without bound: give sigmas that begin below.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon or score at sigma = 1, where there is no signal.

    >>> from fastguide import FlowSchedule
    >>> flow_match_euler(FlowSchedule(shift=3.0), 28)
    StepTable(flow_match_euler, 28 steps, timesteps 1000.0 .. 8.92857142857143, device=cpu)
    """
    if not isinstance(schedule, FlowSchedule):
        raise TypeError(f"schedule: expected a FlowSchedule, got {type(schedule).__name__}")
    if not isinstance(stochastic, bool):
        raise TypeError(f"stochastic: expected True or False, got {stochastic!r}")
    steps = schedule.steps(num_inference_steps, sigmas=sigmas, timesteps=timesteps, mu=mu)
    return flow_match_euler_table(steps, prediction_type, stochastic=stochastic, inverted=schedule.invert_sigmas)


def flow_match_euler_table(
    steps: FlowSteps, prediction_type: PredictionType = "flow_prediction", *, stochastic: bool, inverted: bool
) -> StepTable:
    """Return ``flow_match_euler`` over any sigmas and timesteps; ``inverted``: the sigmas rise."""
    path = 1 - steps.sigmas if inverted else steps.sigmas  # falls from noise to 0
    now, after = path[:-1], path[1:]
    levels = Levels.flow_matching(now)
    columns = x0_columns(prediction_type, levels, None, steps.timesteps, None)
    if inverted and prediction_type == "flow_prediction":  # of the time 1 - sigma
        columns["x0_pred"] = -columns["x0_pred"]
    direct = torch.zeros_like(now)
    if stochastic:
        columns |= {"out_x0": 1 - after, "out_noise": after}
    elif prediction_type == "flow_prediction":
        velocity = after - now
        columns |= {"out_sample": torch.ones_like(now), "out_pred": -velocity if inverted else velocity}
        direct = (now - after) * now / levels.alpha  # velocity = (epsilon - x) / alpha moves with epsilon
    else:
        columns |= {"out_sample": after / now, "out_x0": 1 - after / now}
    variance = after.square() if stochastic else NO_VARIANCE
    return StepTable.from_columns(
        steps.timesteps,
        columns | inpainting_columns(Levels.flow_matching(after)),
        gradients=gradient_forms(columns, x0_shift(levels), direct, steps.timesteps, variance),
        levels=levels,
        name="flow_match_euler",
    )
