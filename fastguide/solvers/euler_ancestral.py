"""Ancestral sampling over sigma: Song et al. 2021's reverse chain as k-diffusion steps it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType, check_prediction_type, epsilon_from, original_from
from ._columns import gradient_forms
from ._unscaled import Churn, SigmaSteps, euler_columns, init_noise_sigma, loop_columns, schedule_steps
from .table import StepTable


def euler_ancestral(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    timesteps: Tensor | Sequence[float] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
) -> StepTable:
    """Return ancestral steps: Euler's method to ``sigma_down``, then noise up to the next sigma.

    With sigma' the next one, ``sigma_up^2 = sigma'^2 * (sigma^2 - sigma'^2) / sigma^2`` is the variance of the reverse
    chain (Song et al. 2021, eq. 47) and ``sigma_down^2 = sigma'^2 - sigma_up^2`` (k-diffusion's
    ``sample_euler_ancestral``). The sample is unscaled, as in ``euler``.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        prediction_type: what the model returns: any but ``flow_prediction``.
        timestep_spacing: ``leading``, ``trailing`` or ``linspace``, whose timesteps are not rounded; ``steps_offset``
            is added in ``leading``.
        timesteps: the timesteps themselves, real numbers that fall strictly, instead of a number and a spacing.
        sigmas: where the steps begin and where the last one ends, strictly falling, instead of all that.

    Returns:
        The step table, its timesteps real.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> euler_ancestral(NoiseSchedule.scaled_linear(), 4, timestep_spacing="trailing")
    StepTable(euler_ancestral, 4 steps, timesteps 999.0 .. 249.0, device=cpu)
    """
    steps = schedule_steps(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        sigmas=sigmas,
    )
    return euler_ancestral_table(steps, prediction_type, init_noise_sigma(steps, timestep_spacing))


def euler_ancestral_table(
    steps: SigmaSteps, prediction_type: PredictionType, init_noise_sigma: float = 1.0
) -> StepTable:
    """Return ``euler_ancestral`` over any sigmas and timesteps."""
    check_prediction_type("prediction_type", prediction_type)
    now, after = steps.sigmas[:-1], steps.sigmas[1:]
    up = after * (now.square() - after.square()).sqrt() / now
    down = after.square() / now  # the root of after^2 - up^2
    levels = Levels.variance_exploding(now)
    x0 = original_from(prediction_type, levels)
    shift, direct, epsilon = now.square(), torch.zeros_like(now), None
    if prediction_type in ("epsilon", "score"):
        epsilon = epsilon_from(prediction_type, levels).pred
        direct = (now - down) * now
    columns = euler_columns(Churn(now, torch.zeros_like(now)), down, x0, epsilon) | {"out_noise": up}
    loop, first_in_scale = loop_columns(steps.sigmas)
    return StepTable.from_columns(
        steps.timesteps,
        columns | loop,
        gradients=gradient_forms(columns, shift, direct, steps.timesteps, up.square()),
        levels=levels,
        first_in_scale=first_in_scale,
        init_noise_sigma=init_noise_sigma,
        name="euler_ancestral",
    )
