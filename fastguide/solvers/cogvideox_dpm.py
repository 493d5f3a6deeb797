"""CogVideoX's DPM-Solver++: Yang et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ._columns import check_schedule, inpainting_columns, visited_timesteps, x0_columns
from ._dpm import interval, lambda_of, levels_of, second_order
from .begin import begins_anywhere, check_begin
from .entries import Entry, Form, history_columns, history_gradients
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
    ends = [call == len(a) - 1 for call in range(len(a))]
    return cogvideox_dpm_table(visited[begin:], a, torch.cat([a[1:], final]), ends, prediction_type)


def cogvideox_dpm_table(
    timesteps: Tensor, a: Tensor, a_next: Tensor, ends: Sequence[bool], prediction_type: PredictionType
) -> StepTable:
    """Return ``cogvideox_dpm`` over any transitions, from abar ``a`` at ``timesteps`` to ``a_next``.

    The first step, and one that ends the loop, are of order 1.
    """
    here, after = Levels.from_alphas_cumprod(a), Levels.from_alphas_cumprod(a_next)
    points, forms = levels_of(here), list[Form]()
    for call, (start, end) in enumerate(zip(points, levels_of(after), strict=True)):
        over = interval("sde-dpmsolver++", start, end)
        form = Form(sample=over.sample, noise=over.noise).add({call: over.first})
        if call > 0 and not ends[call]:
            w = second_order(over, (lambda_of(start) - lambda_of(points[call - 1])) / over.h, "midpoint")
            form.add({call: w, call - 1: -w})
        forms.append(form)
    columns = x0_columns(prediction_type, here, None, timesteps, None)
    columns |= history_columns(forms, Entry.original(here))
    known = a_next.clone()
    known[-1] = 1.0  # a known image is clean after the last step
    return StepTable.from_columns(
        timesteps,
        columns | inpainting_columns(Levels.from_alphas_cumprod(known)),
        gradients=history_gradients(columns, here, timesteps, columns["out_noise"].square()),
        levels=here,
        name="cogvideox_dpm",
    )
