"""DDPM, ancestral sampling: Ho et al. 2020; learned variances: Nichol & Dhariwal 2021."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ._columns import check_schedule, finite_or_reason, inpainting_columns, visited_timesteps, x0_columns, x0_shift
from ._options import check_choice
from .table import StepTable

VarianceType: TypeAlias = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
]

_SMALLEST_VARIANCE = 1e-20  # the posterior variance of the last step is 0; its logarithm must exist


def ddpm(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_sample_range: float | None = None,
    timestep_spacing: TimestepSpacing = "leading",
    steps_offset: int = 0,
    timesteps: Tensor | Sequence[int] | None = None,
) -> StepTable:
    """Return the steps of ancestral sampling (Ho et al. 2020, eq. 6-7), over all training timesteps or some of them.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps; ``None`` visits every training timestep.
        prediction_type: what the model returns.
        variance_type: variance of each step: ``fixed_small`` the posterior's, ``fixed_large`` beta, the ``_log`` forms
            the same through their logarithm, ``learned`` the model's log-variance, ``learned_range`` the model's
            interpolation from log posterior (-1) to log beta (1) (Nichol & Dhariwal 2021, eq. 15). With the last two,
            ``guided_step`` takes ``variance=``.
        clip_sample_range: the predicted x_0 is clipped to ``[-range, range]``; ``None``: not at all.
        timestep_spacing: ``leading``, ``trailing`` or ``linspace``; ``steps_offset`` is added in ``leading``.
        timesteps: the timesteps themselves, strictly falling, instead of a number and a spacing.

    Returns:
        The step table. No noise is added at the last step. Differs from diffusers where that returns NaN:
        ``fixed_large_log`` and ``learned`` take the square root of a log-variance there.

    >>> from fastguide import NoiseSchedule
    >>> ddpm(NoiseSchedule.linear(), 50)
    StepTable(ddpm, 50 steps, timesteps 980 .. 0, device=cpu)
    """
    check_schedule(schedule)
    check_choice("variance_type", variance_type, VarianceType)
    if num_inference_steps is None and timesteps is None:
        num_inference_steps = schedule.num_train_timesteps
    visited = visited_timesteps(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps)
    a = schedule.alphas_cumprod[visited]
    return ddpm_table(
        visited,
        a,
        torch.cat([a[1:], a.new_ones(1)]),
        torch.arange(len(visited), device="cpu") < len(visited) - 1,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample_range=clip_sample_range,
    )


def ddpm_table(
    timesteps: Tensor,
    a: Tensor,
    a_prev: Tensor,
    adds_noise: Tensor,
    *,
    prediction_type: PredictionType,
    variance_type: VarianceType,
    clip_sample_range: float | None,
    undefined: str | None = None,
    beta: Tensor | None = None,
) -> StepTable:
    """Return ``ddpm`` over any transitions, from abar ``a`` at ``timesteps`` to ``a_prev``.

    ``beta``: of the transitions, if not ``1 - a / a_prev``; ``undefined``: rows may be infinite or NaN, and this says
    why a step at one of them is refused.
    """
    # x' = sqrt(a_prev)*beta/(1-a) * x_0 + sqrt(alpha)*(1-a_prev)/(1-a) * x + sqrt(variance) * z
    alpha = a / a_prev if beta is None else 1 - beta
    beta = 1 - alpha
    posterior = ((1 - a_prev) / (1 - a) * beta).clamp(min=_SMALLEST_VARIANCE)
    levels = Levels.from_alphas_cumprod(a)
    columns = x0_columns(prediction_type, levels, clip_sample_range, timesteps, undefined)
    columns["out_x0"] = a_prev.sqrt() * beta / (1 - a)
    columns["out_sample"] = alpha.sqrt() * (1 - a_prev) / (1 - a)
    columns |= inpainting_columns(Levels.from_alphas_cumprod(a_prev))
    noise, mean_shift = _variance_columns(variance_type, posterior, beta, adds_noise.to(a.dtype))
    columns |= noise
    shift = x0_shift(levels)
    before_clip, after_clip = {"x0_grad": shift / columns["x0_scale"]}, {"out_grad": columns["out_x0"] * shift}
    return StepTable.from_columns(
        timesteps,
        columns,
        gradients={
            "epsilon": finite_or_reason(before_clip, a, a_prev, timesteps),
            "epsilon_after_clip": finite_or_reason(after_clip, a, a_prev, timesteps),
            "mean": mean_shift,
        },
        learned_variance=variance_type.startswith("learned"),
        undefined=undefined,
        levels=levels,
        name="ddpm",
    )


def _variance_columns(
    variance_type: VarianceType, posterior: Tensor, beta: Tensor, adds_noise: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the columns of the noise, and those that move the mean by variance * s * g."""
    zero, one = torch.zeros_like(beta), torch.ones_like(beta)
    if variance_type == "learned":  # the model's v is the log-variance
        return {"logvar_base": zero, "logvar_span": one, "out_noise": adds_noise}, {"out_var_grad": one}
    if variance_type == "learned_range":  # v interpolates: log posterior at -1, log beta at 1
        low, high = posterior.log(), beta.log()
        columns = {"logvar_base": (low + high) / 2, "logvar_span": (high - low) / 2, "out_noise": adds_noise}
        return columns, {"out_var_grad": one}
    # a log form is the same number, reached through its logarithm
    variance = posterior if variance_type.startswith("fixed_small") else beta
    return {"out_noise": variance.sqrt() * adds_noise}, {"out_grad": variance}
