"""Solvers: each is one function from a noise schedule to a step table. Formulas of rows stand here and only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType, check_prediction_type, epsilon_from, original_from
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
    """Ancestral sampling (Ho et al. 2020, eq. 6-7) over all training timesteps or a choice of them.

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
    _check_schedule(schedule)
    if variance_type not in get_args(VarianceType):
        raise ValueError(f"variance_type: expected one of {get_args(VarianceType)}, got {variance_type!r}")
    if num_inference_steps is None and timesteps is None:
        num_inference_steps = schedule.num_train_timesteps
    steps = _visited(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps)
    a = schedule.alphas_cumprod[steps]
    return ddpm_table(
        steps,
        a,
        torch.cat([a[1:], a.new_ones(1)]),
        torch.arange(len(steps), device="cpu") < len(steps) - 1,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample_range=clip_sample_range,
    )


def ddpm_table(
    steps: Tensor,
    a: Tensor,
    a_prev: Tensor,
    noisy: Tensor,
    *,
    prediction_type: PredictionType,
    variance_type: VarianceType,
    clip_sample_range: float | None,
    undefined: str | None = None,
) -> StepTable:
    """``ddpm`` over any transitions: from abar ``a`` at the timesteps ``steps`` to ``a_prev``, noise where ``noisy``.

    ``undefined``: rows may be infinite or NaN, and this says why a step at one of them is refused.
    """
    columns = _original_columns(prediction_type, a, clip_sample_range, steps, undefined)
    noisy = noisy.to(a.dtype)
    alpha = a / a_prev
    beta = 1 - alpha
    posterior = ((1 - a_prev) / (1 - a) * beta).clamp(min=_SMALLEST_VARIANCE)
    columns["out_x0"] = a_prev.sqrt() * beta / (1 - a)
    columns["out_sample"] = alpha.sqrt() * (1 - a_prev) / (1 - a)
    columns |= _known_columns(a_prev)
    mean_shift: dict[str, Tensor] = {}
    if variance_type == "learned":
        columns |= {"logvar_base": torch.zeros_like(a), "logvar_span": torch.ones_like(a), "out_noise": noisy}
        mean_shift["out_var_grad"] = torch.ones_like(a)
    elif variance_type == "learned_range":
        low, high = posterior.log(), beta.log()
        columns |= {"logvar_base": (low + high) / 2, "logvar_span": (high - low) / 2, "out_noise": noisy}
        mean_shift["out_var_grad"] = torch.ones_like(a)
    else:  # a log form is the same number, reached through its logarithm
        variance = posterior if variance_type.startswith("fixed_small") else beta
        columns["out_noise"] = variance.sqrt() * noisy
        mean_shift["out_grad"] = variance

    x0_shift = _original_shift(a)
    return StepTable(
        steps,
        columns,
        gradients={
            "epsilon": _finite({"x0_grad": x0_shift / columns["x0_scale"]}, a, a_prev, steps),
            "epsilon_after_clip": _finite({"out_grad": columns["out_x0"] * x0_shift}, a, a_prev, steps),
            "mean": mean_shift,
        },
        learned_variance=variance_type.startswith("learned"),
        undefined=undefined,
        alphas_cumprod=a,
        name="ddpm",
    )


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
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

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
    _check_schedule(schedule)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: expected a number from 0 to 1, got {eta!r}")
    steps = _visited(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps)
    a = schedule.alphas_cumprod[steps]
    one = torch.ones_like(a[:1])
    return ddim_table(
        steps,
        a,
        torch.cat([a[1:], one if set_alpha_to_one else schedule.alphas_cumprod[:1]]),
        a_known=torch.cat([a[1:], one]),
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        prediction_type=prediction_type,
        clip_sample_range=clip_sample_range,
    )


def ddim_table(
    steps: Tensor,
    a: Tensor,
    a_prev: Tensor,
    *,
    eta: float,
    use_clipped_model_output: bool,
    prediction_type: PredictionType,
    clip_sample_range: float | None,
    undefined: str | None = None,
    a_known: Tensor | None = None,
) -> StepTable:
    """``ddim`` over any transitions, as ``ddpm_table``; with ``a_prev`` below ``a``, the inversion.

    ``a_known``: the abar to which a known image is noised after the step, if not ``a_prev``: 1 after the last.
    """
    columns = _original_columns(prediction_type, a, clip_sample_range, steps, undefined)
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).clamp(min=0).sqrt()
    direction = (1 - a_prev - sigma.square()).clamp(min=0).sqrt()
    columns["out_noise"] = sigma
    columns |= _known_columns(a_prev if a_known is None else a_known)
    x0_shift = _original_shift(a)
    # The gradient moves epsilon by -sqrt(1-a)*s*g, and x_0 with it.
    epsilon_shift = -direction * (1 - a).sqrt()
    after_clip = {"out_grad": a_prev.sqrt() * x0_shift + epsilon_shift}
    if use_clipped_model_output:
        columns["out_x0"] = a_prev.sqrt() - direction * (a / (1 - a)).sqrt()
        columns["out_sample"] = direction / (1 - a).sqrt()
        before_clip = {"x0_grad": x0_shift / columns["x0_scale"]}
    else:
        epsilon = epsilon_from(prediction_type, a)
        columns["out_x0"] = a_prev.sqrt()
        columns["out_sample"] = direction * epsilon.scale * epsilon.sample
        columns["out_pred"] = direction * epsilon.scale * epsilon.pred
        before_clip = {"x0_grad": x0_shift / columns["x0_scale"], "out_grad": epsilon_shift}
    return StepTable(
        steps,
        columns,
        gradients={
            "epsilon": _finite(before_clip, a, a_prev, steps),
            "epsilon_after_clip": _finite(after_clip, a, a_prev, steps),
            "mean": {"out_grad": sigma.square()}
            if eta > 0
            else "its steps have no variance to shift the mean by (eta is 0); use form='epsilon'",
        },
        undefined=undefined,
        alphas_cumprod=a,
        name="ddim",
    )


def _check_schedule(schedule: NoiseSchedule) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")


def _visited(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    spacing: TimestepSpacing,
    steps_offset: int,
    timesteps: Tensor | Sequence[int] | None,
) -> Tensor:
    if timesteps is None:
        if num_inference_steps is None:
            raise ValueError("num_inference_steps: expected a number, or timesteps=, got None")
        return schedule.timesteps(num_inference_steps, spacing, steps_offset=steps_offset)
    steps = schedule.check_timesteps(timesteps)
    if num_inference_steps is not None and num_inference_steps != len(steps):
        raise ValueError(
            f"num_inference_steps: expected {len(steps)}, the length of timesteps, got {num_inference_steps}"
        )
    return steps


def _original_columns(
    prediction_type: PredictionType, a: Tensor, clip_sample_range: float | None, steps: Tensor, undefined: str | None
) -> dict[str, Tensor]:
    check_prediction_type("prediction_type", prediction_type)
    number = isinstance(clip_sample_range, (int, float)) and not isinstance(clip_sample_range, bool)
    if clip_sample_range is not None and not (number and clip_sample_range > 0):
        raise ValueError(f"clip_sample_range: expected a positive number or None, got {clip_sample_range!r}")
    original = original_from(prediction_type, a)
    if undefined is None and not bool(torch.isfinite(original.scale).all()):
        raise ValueError(
            f"prediction_type: {prediction_type!r} says nothing of x_0 at timestep {int(steps[0])}, where the schedule "
            "has zero signal; expected 'v_prediction' or 'sample', or timesteps that start later"
        )
    clip = torch.full_like(a, torch.inf if clip_sample_range is None else clip_sample_range)
    return {"x0_scale": original.scale, "x0_sample": original.sample, "x0_pred": original.pred, "clip": clip}


def _known_columns(a: Tensor) -> dict[str, Tensor]:
    """A known x_0 at the level of abar ``a`` (Ho et al. 2020, eq. 4)."""
    return {"known_sample": a.sqrt(), "known_noise": (1 - a).sqrt()}


def _original_shift(a: Tensor) -> Tensor:
    """By how much x_0 moves for s*g = 1 when epsilon moves by -sqrt(1-a) (Dhariwal & Nichol 2021, algorithm 2)."""
    return (1 - a) * a.rsqrt()


def _finite(gradient: Mapping[str, Tensor], a: Tensor, a_prev: Tensor, steps: Tensor) -> Mapping[str, Tensor] | str:
    """The gradient's columns, if they are finite where the transition itself is defined."""
    defined = a.isfinite() & a_prev.isfinite()
    bad = torch.stack([~values.isfinite() for values in gradient.values()]).any(0) & defined
    if not bool(bad.any()):
        return gradient
    timestep = int(steps[bad][0])
    return f"the schedule has zero signal at timestep {timestep}, where a shift of epsilon moves x_0 without bound"
