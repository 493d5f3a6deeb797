"""CogVideoX's DPM-Solver++: Yang et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import Linear, PredictionType
from ._columns import check_schedule, visited_timesteps, x0_columns
from ._dpm import multistep_columns
from ._signal_steps import SignalSteps, signal_table
from .begin import begins_anywhere, check_begin
from .table import StepTable


@begins_anywhere
def cogvideox_dpm(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "v_prediction",
    timestep_spacing: TimestepSpacing = "trailing",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    timesteps: Tensor | Sequence[int] | None = None,
    begin: int = 0,
) -> StepTable:
    """Return CogVideoX's stochastic steps: SDE-DPM-Solver++(2M) (Lu et al. 2022), the last step of order 1.

    They are those of ``dpm_solver`` with ``algorithm_type="sde-dpmsolver++"``, over timesteps that begin where the
    schedule, that of ``cogvideox_ddim``, has no signal.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` does not say them.
        prediction_type: what the model returns.
        timestep_spacing, steps_offset, set_alpha_to_one, timesteps: as in ``ddim``.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, whose calls go on from earlier ones: it has ``history_slots``. A step leads to the next timestep
        of the table; diffusers subtracts the same number at every step, which differs where the spacing is uneven.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon at a timestep without signal.

    >>> from fastguide import NoiseSchedule
    >>> cogvideox_dpm(NoiseSchedule.scaled_linear().shift_snr(3.0).rescale_zero_terminal_snr(), 50)
    StepTable(cogvideox_dpm, 50 steps, timesteps 999 .. 19, device=cpu)
    """
    check_schedule(schedule)
    visited = visited_timesteps(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps)
    check_begin(begin, len(visited))
    a = schedule.alphas_cumprod[visited[begin:]]
    final = torch.ones_like(a[:1]) if set_alpha_to_one else schedule.alphas_cumprod[:1]
    steps = SignalSteps(Levels.from_alphas_cumprod(torch.cat([a, final])), visited[begin:], begin)
    x0 = x0_columns(prediction_type, steps.here, None, steps.timesteps, None)
    columns = multistep_columns(
        steps.levels,
        Linear(x0["x0_scale"], x0["x0_sample"], x0["x0_pred"]),
        solver_order=2,
        algorithm_type="sde-dpmsolver++",
        solver_type="midpoint",
        lower_order_final=False,
        euler_at_final=True,
        total=steps.total,
    )
    return signal_table(steps, columns, "cogvideox_dpm")
