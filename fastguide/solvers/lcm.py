"""Latent consistency models, multistep sampling: Luo et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import PredictionType
from ._columns import check_range, gradient_forms, inpainting_columns, x0_columns, x0_shift
from ._distilled import distilled_timesteps
from .table import StepTable

_SIGMA_DATA = 0.5


def consistency_function(timesteps: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """Return the factors of x and of x_0, c_skip and c_out, in what a latent consistency model predicts."""
    scaled = timesteps.double() * timestep_scaling
    squares = scaled.square() + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / squares, scaled / squares.sqrt()


def lcm(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
    prediction_type: PredictionType = "epsilon",
    clip_sample_range: float | None = None,
    timesteps: Tensor | Sequence[int] | None = None,
) -> StepTable:
    """Return a latent consistency model's steps: to x_0, and back to the next level (Luo et al. 2023, algorithm 3).

    The consistency function is ``c_skip * x + c_out * x_0``, with ``c_skip = 0.25 / (T^2 + 0.25)``,
    ``c_out = T / sqrt(T^2 + 0.25)`` and ``T = timestep_scaling * t`` (Song et al. 2023, appendix C).

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` does not say them: 1 to 8 as a rule.
        original_inference_steps: the steps that the model was distilled at, of which ``num_inference_steps`` are
            visited.
        timestep_scaling: T over t.
        prediction_type: what the model returns.
        clip_sample_range: the predicted x_0 is clipped to ``[-range, range]``; ``None``: not at all.
        timesteps: the timesteps themselves, strictly falling, instead of a number.

    Returns:
        The step table. No noise is added at the last step. Image-to-image is a part of the table; diffusers visits
        other timesteps there, which ``timesteps=`` can name.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon at a timestep without signal.

    >>> from fastguide import NoiseSchedule
    >>> lcm(NoiseSchedule.scaled_linear(), 4).timesteps
    tensor([999, 759, 499, 259])
    """
    visited = distilled_timesteps(schedule, num_inference_steps, original_inference_steps, timesteps)
    check_range("timestep_scaling", timestep_scaling, 0.0, math.inf, above=True)
    abar = schedule.alphas_cumprod[visited]
    return lcm_table(visited, abar, timestep_scaling, prediction_type, clip_sample_range)


def lcm_table(
    visited: Tensor,
    abar: Tensor,
    timestep_scaling: float,
    prediction_type: PredictionType,
    clip_sample_range: float | None,
) -> StepTable:
    """Return ``lcm`` over any timesteps, with abar there."""
    levels = Levels.from_alphas_cumprod(abar)
    after = Levels(*(torch.cat([now[1:], now.new_tensor([end])]) for now, end in zip(levels, (1.0, 0.0), strict=True)))
    c_skip, c_out = consistency_function(visited, timestep_scaling)
    columns = x0_columns(prediction_type, levels, clip_sample_range, visited, None)
    columns |= {"out_x0": after.alpha * c_out, "out_sample": after.alpha * c_skip, "out_noise": after.sigma}
    return StepTable.from_columns(
        visited,
        columns | inpainting_columns(after),
        gradients=gradient_forms(columns, x0_shift(levels), torch.zeros_like(c_out), visited, after.sigma.square()),
        levels=levels,
        name="lcm",
    )
