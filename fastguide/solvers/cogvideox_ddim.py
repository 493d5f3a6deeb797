"""CogVideoX's DDIM: Yang et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from .ddim import ddim
from .table import StepTable


def cogvideox_ddim(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "v_prediction",
    timestep_spacing: TimestepSpacing = "trailing",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    timesteps: Tensor | Sequence[int] | None = None,
) -> StepTable:
    """Return CogVideoX's steps: ``x' = A * x + (sqrt(abar') - sqrt(abar) * A) * x_0``, A = sqrt((1-abar')/(1-abar)).

    That is deterministic DDIM (Song et al. 2021, eq. 12) whose epsilon is that of x and x_0. The schedule is
    ``NoiseSchedule.scaled_linear().shift_snr(3.0).rescale_zero_terminal_snr()`` (Yang et al. 2024; scale 1 for the
    larger models), at whose last timestep the sample holds no signal.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` does not say them.
        prediction_type: what the model returns.
        timestep_spacing, steps_offset, set_alpha_to_one, timesteps: as in ``ddim``.

    Returns:
        The step table. A step leads to the next timestep of the table; diffusers subtracts the same number at every
        step, which differs where the spacing is uneven.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon at a timestep without signal.

    >>> from fastguide import NoiseSchedule
    >>> cogvideox_ddim(NoiseSchedule.scaled_linear().shift_snr(3.0).rescale_zero_terminal_snr(), 50)
    StepTable(cogvideox_ddim, 50 steps, timesteps 999 .. 19, device=cpu)
    """
    table = ddim(
        schedule,
        num_inference_steps,
        use_clipped_model_output=True,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        timesteps=timesteps,
    )
    return replace(table, name="cogvideox_ddim")
