"""DDIM, denoising diffusion implicit models: Song et al. 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType, epsilon_from
from ._columns import check_schedule, finite_or_reason, inpainting_columns, visited_timesteps, x0_columns, x0_shift
from .table import StepTable


def ddim(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    prediction_type: PredictionType = "epsilon",
    clip_sample_range: float | None = None,
    timestep_spacing: TimestepSpacing = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    timesteps: Tensor | Sequence[int] | None = None,
) -> StepTable:
    """Return the steps of denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` does not say them.
        eta: 0 deterministic, 1 the variance of ancestral sampling.
        use_clipped_model_output: epsilon is recomputed from the clipped x_0 before it is used again.
        prediction_type: what the model returns.
        clip_sample_range: the predicted x_0 is clipped to ``[-range, range]``; ``None``: not at all.
        timestep_spacing: ``leading``, ``trailing`` or ``linspace``; ``steps_offset`` is added in ``leading``.
        set_alpha_to_one: the last step leads to abar = 1; otherwise to the abar of timestep 0.
        timesteps: the timesteps themselves, strictly falling, instead of a number and a spacing.

    Returns:
        The step table. A step leads to the next timestep of the table, also where the spacing is uneven.

    >>> from fastguide import NoiseSchedule
    >>> ddim(NoiseSchedule.scaled_linear(), 20, set_alpha_to_one=False, steps_offset=1)
    StepTable(ddim, 20 steps, timesteps 951 .. 1, device=cpu)
    """
    check_schedule(schedule)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: expected a number from 0 to 1, got {eta!r}")
    visited = visited_timesteps(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps)
    a = schedule.alphas_cumprod[visited]
    one = torch.ones_like(a[:1])
    return ddim_table(
        visited,
        a,
        torch.cat([a[1:], one if set_alpha_to_one else schedule.alphas_cumprod[:1]]),
        inpainting_levels=Levels.from_alphas_cumprod(torch.cat([a[1:], one])),
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        prediction_type=prediction_type,
        clip_sample_range=clip_sample_range,
    )


def ddim_table(
    timesteps: Tensor,
    a: Tensor,
    a_prev: Tensor,
    *,
    eta: float,
    use_clipped_model_output: bool,
    prediction_type: PredictionType,
    clip_sample_range: float | None,
    undefined: str | None = None,
    inpainting_levels: Levels | None = None,
) -> StepTable:
    """Return ``ddim`` over any transitions, as ``ddpm_table`` does; with ``a_prev`` below ``a``, the inversion.

    ``inpainting_levels``: those to which a known image is noised after each step, if not ``a_prev``'s: 1 and 0 after
    the last.
    """
    # x' = sqrt(a_prev) * x_0 + direction * epsilon + sigma * z
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).clamp(min=0).sqrt()
    direction = (1 - a_prev - sigma.square()).clamp(min=0).sqrt()
    levels = Levels.from_alphas_cumprod(a)
    columns = x0_columns(prediction_type, levels, clip_sample_range, timesteps, undefined)
    columns["out_noise"] = sigma
    columns |= inpainting_columns(inpainting_levels or Levels.from_alphas_cumprod(a_prev))
    shift = x0_shift(levels)
    epsilon_shift = -direction * levels.sigma  # the gradient moves epsilon by -sqrt(1-a)*s*g, and x_0 with it
    before_clip = {"x0_grad": shift / columns["x0_scale"]}
    if use_clipped_model_output:  # epsilon of the clipped x_0: (x - sqrt(a) * x_0) / sqrt(1-a)
        columns["out_x0"] = a_prev.sqrt() - direction * levels.alpha / levels.sigma
        columns["out_sample"] = direction / levels.sigma
    else:
        epsilon = epsilon_from(prediction_type, levels)
        columns["out_x0"] = a_prev.sqrt()
        columns["out_sample"] = direction * epsilon.scale * epsilon.sample
        columns["out_pred"] = direction * epsilon.scale * epsilon.pred
        before_clip["out_grad"] = epsilon_shift
    after_clip = {"out_grad": a_prev.sqrt() * shift + epsilon_shift}
    return StepTable.from_columns(
        timesteps,
        columns,
        gradients={
            "epsilon": finite_or_reason(before_clip, a, a_prev, timesteps),
            "epsilon_after_clip": finite_or_reason(after_clip, a, a_prev, timesteps),
            "mean": {"out_grad": sigma.square()} if eta > 0 else _NO_VARIANCE,
        },
        undefined=undefined,
        levels=levels,
        name="ddim",
    )


_NO_VARIANCE = "its steps have no variance to shift the mean by (eta is 0); use form='epsilon'"
