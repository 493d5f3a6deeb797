"""Euler's method over sigma, with and without churn: Karras et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType, check_prediction_type, epsilon_from, original_from
from ..schedules.sigmas import SigmaSpacing
from ._columns import NO_VARIANCE, gradient_forms
from ._unscaled import (
    Churn,
    FinalSigmasType,
    SigmaSteps,
    TimestepType,
    churn,
    euler_columns,
    init_noise_sigma,
    loop_columns,
    schedule_steps,
    told_timesteps,
)
from .table import StepTable


def euler(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    sigma_spacing: SigmaSpacing | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: FinalSigmasType = "zero",
    timestep_spacing: TimestepSpacing = "linspace",
    timestep_type: TimestepType = "discrete",
    steps_offset: int = 0,
    timesteps: Tensor | Sequence[float] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """Return the steps of Euler's method on the probability-flow ODE (Karras et al. 2022, eq. 4 and algorithm 2).

    The sample is unscaled, ``x = x_0 + sigma * epsilon``: the model's input is ``x / sqrt(sigma^2 + 1)``, and sampling
    starts from noise of the standard deviation ``table.init_noise_sigma``; ``Sampler`` does both. A classifier's
    gradient is that of log p(y | x) in this sample, and the classifier is given it unscaled.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        prediction_type: what the model returns: any but ``flow_prediction``.
        sigma_spacing: ``"karras"``, ``"exponential"`` or ``"beta"`` between the largest and the smallest sigma that
            the timesteps would visit; ``None``: those of the timesteps.
        sigma_min, sigma_max: other ends of that spacing.
        final_sigmas_type: the last step leads to ``"zero"``, or to ``"sigma_min"``, the sigma of timestep 0.
        timestep_spacing: ``leading``, ``trailing`` or ``linspace``, whose timesteps are not rounded; ``steps_offset``
            is added in ``leading``.
        timestep_type: the model is told the timestep, ``"discrete"``, or ``"continuous"``, log(sigma) / 4.
        timesteps: the timesteps themselves, real numbers that fall strictly, instead of a number and a spacing.
        sigmas: where the steps begin and where the last one ends (0 or above), strictly falling, instead of all that.
        s_churn: how much noise is added in total before the steps, which undo it; 0: none.
        s_tmin, s_tmax: only at sigmas from s_tmin to s_tmax.
        s_noise: the standard deviation of that noise, slightly above 1 where a model removes too much.

    Returns:
        The step table, its timesteps real.

    Raises:
        TypeError, ValueError: an argument is not as described, or the sigmas do not fall.

    >>> from fastguide import NoiseSchedule
    >>> table = euler(NoiseSchedule.scaled_linear(), 30, timestep_spacing="leading", steps_offset=1)
    >>> table, f"{table.init_noise_sigma:.4f}"
    (StepTable(euler, 30 steps, timesteps 958.0 .. 1.0, device=cpu), '11.5203')
    """
    steps = schedule_steps(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        sigmas=sigmas,
        sigma_spacing=sigma_spacing,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        final_sigmas_type=final_sigmas_type,
    )
    told = told_timesteps(steps, timestep_type)
    first = init_noise_sigma(steps, timestep_spacing)
    churned = churn(steps.sigmas, s_churn, s_tmin, s_tmax, s_noise)
    return euler_table(steps._replace(timesteps=told), churned, prediction_type, first)


def euler_table(
    steps: SigmaSteps, churned: Churn, prediction_type: PredictionType, init_noise_sigma: float = 1.0
) -> StepTable:
    """Return ``euler`` over any sigmas and timesteps."""
    check_prediction_type("prediction_type", prediction_type)
    told = steps.timesteps
    now, after = steps.sigmas[:-1], steps.sigmas[1:]
    levels = Levels.variance_exploding(now)
    x0 = original_from(prediction_type, levels)
    if prediction_type in ("epsilon", "score"):  # it is the slope itself, also where the churn has moved the sample
        epsilon = epsilon_from(prediction_type, levels)
        x0 = x0._replace(pred=-churned.sigmas * epsilon.pred)
        columns = euler_columns(churned, after, x0, epsilon.pred)
        shift, direct = churned.sigmas * now, (churned.sigmas - after) * now
    else:
        columns = euler_columns(churned, after, x0, None)
        shift, direct = now.square(), torch.zeros_like(now)
    loop, first_in_scale = loop_columns(steps.sigmas)
    variance = columns["out_noise"].square() if bool((churned.noise > 0).any()) else NO_VARIANCE
    return StepTable.from_columns(
        told,
        columns | loop,
        gradients=gradient_forms(columns, shift, direct, told, variance),
        levels=levels,
        first_in_scale=first_in_scale,
        init_noise_sigma=init_noise_sigma,
        name="euler",
    )
