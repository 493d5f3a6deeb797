"""Trajectory consistency distillation, strategic stochastic sampling: Zheng et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import PredictionType, epsilon_from
from ._columns import NO_VARIANCE, check_range, gradient_forms, inpainting_columns, x0_columns, x0_shift
from ._distilled import distilled_timesteps
from .table import StepTable

_ROUNDING = 1e-6  # 0.7 * 90 is 63, and not 62.99999999999999; diffusers floors what its float32 makes of it


def tcd(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    eta: float = 0.3,
    original_inference_steps: int = 50,
    prediction_type: PredictionType = "epsilon",
    timesteps: Tensor | Sequence[int] | None = None,
) -> StepTable:
    """Return the steps of a trajectory consistency model (Zheng et al. 2024, algorithm 4).

    A step jumps to timestep ``s = floor((1 - eta) * t')`` along the trajectory, as DDIM does, and is noised back to the
    next timestep t'; the last step jumps to timestep 0, and not quite to x_0.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` does not say them.
        eta: 0, deterministic, to 1, where each step goes to timestep 0 and back; the paper's gamma.
        original_inference_steps: the steps that the model was distilled at, of which ``num_inference_steps`` are
            visited.
        prediction_type: what the model returns.
        timesteps: the timesteps themselves, strictly falling, instead of a number.

    Returns:
        The step table.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon at a timestep without signal.

    >>> from fastguide import NoiseSchedule
    >>> tcd(NoiseSchedule.scaled_linear(), 8)
    StepTable(tcd, 8 steps, timesteps 999 .. 139, device=cpu)
    """
    check_range("eta", eta, 0.0, 1.0)
    visited = distilled_timesteps(schedule, num_inference_steps, original_inference_steps, timesteps)
    following = torch.cat([visited[1:], visited.new_zeros(1)])
    jump = ((1 - eta) * following.double() + _ROUNDING).floor().long()
    return tcd_table(visited, jump, schedule.alphas_cumprod, eta, prediction_type)


def tcd_table(visited: Tensor, jump: Tensor, abar: Tensor, eta: float, prediction_type: PredictionType) -> StepTable:
    """Return ``tcd`` over any timesteps and those jumped to, with abar of every training timestep."""
    following = torch.cat([visited[1:], visited.new_zeros(1)])
    levels = Levels.from_alphas_cumprod(abar[visited])
    to = Levels.from_alphas_cumprod(abar[jump])
    kept = abar[following] / abar[jump]  # of the signal, as noise is added from s to t'; 1 in the last step
    epsilon = epsilon_from(prediction_type, levels)
    columns = x0_columns(prediction_type, levels, None, visited, None)
    direction = kept.sqrt() * to.sigma
    columns |= {
        "out_x0": kept.sqrt() * to.alpha,
        "out_sample": direction * epsilon.scale * epsilon.sample,
        "out_pred": direction * epsilon.scale * epsilon.pred,
        "out_noise": (1 - kept).clamp(min=0).sqrt(),
    }
    clean = abar.new_ones(1)  # what is known is in the end the image itself
    known = Levels.from_alphas_cumprod(torch.cat([abar[following[:-1]], clean]))
    variance = columns["out_noise"].square() if eta > 0 else NO_VARIANCE
    return StepTable.from_columns(
        visited,
        columns | inpainting_columns(known),
        gradients=gradient_forms(columns, x0_shift(levels), -direction * levels.sigma, visited, variance),
        levels=levels,
        name="tcd",
    )
