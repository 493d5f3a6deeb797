"""Columns and checks that the solver families share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType, check_prediction_type, original_from


def x0_columns(
    prediction_type: PredictionType,
    levels: Levels,
    clip_sample_range: float | None,
    timesteps: Tensor,
    undefined: str | None,
) -> dict[str, Tensor]:
    """Return the columns of x_0; refuse a prediction that does not determine it, unless ``undefined`` says why."""
    check_prediction_type("prediction_type", prediction_type)
    is_number = isinstance(clip_sample_range, (int, float)) and not isinstance(clip_sample_range, bool)
    if clip_sample_range is not None and not (is_number and clip_sample_range > 0):
        raise ValueError(f"clip_sample_range: expected a positive number or None, got {clip_sample_range!r}")
    original = original_from(prediction_type, levels)
    if undefined is None and not bool(torch.isfinite(original.scale).all()):
        raise ValueError(
            f"prediction_type: {prediction_type!r} says nothing of x_0 at timestep {timesteps[0].item()}, where the "
            "schedule has zero signal; expected 'v_prediction' or 'sample', or timesteps that start later"
        )
    clip = torch.full_like(levels.alpha, torch.inf if clip_sample_range is None else clip_sample_range)
    return original.columns() | {"clip": clip}


def inpainting_columns(levels: Levels) -> dict[str, Tensor]:
    """Return the columns that noise a known x_0 to these levels (Ho et al. 2020, eq. 4)."""
    return {"known_sample": levels.alpha, "known_noise": levels.sigma}


def x0_shift(levels: Levels) -> Tensor:
    """Return how far x_0 moves for s*g = 1, when epsilon moves by -sigma (Dhariwal & Nichol 2021, algorithm 2)."""
    return levels.sigma.square() / levels.alpha


def gradient_forms(
    columns: Mapping[str, Tensor], shift: Tensor, direct: Tensor, timesteps: Tensor, variance: Tensor | str
) -> dict[str, Mapping[str, Tensor] | str]:
    """Return a gradient's columns in each form, or the reason why it has none.

    Args:
        columns: the row's own.
        shift: how far x_0 moves for s*g = 1, as epsilon moves by -sigma (``x0_shift``).
        direct: how far the next sample moves besides: by the epsilon or velocity that the row takes itself.
        timesteps: of the rows, for messages.
        variance: of the step, by which the gradient moves its mean; or why there is none.
    """
    one, zero = torch.ones_like(shift), torch.zeros_like(shift)
    before = {"x0_grad": shift / columns.get("x0_scale", one), "out_grad": direct}
    after = {"out_grad": torch.where(columns.get("out_x0", zero) != 0, columns.get("out_x0", zero) * shift, 0) + direct}
    return {
        "epsilon": finite_or_reason(before, one, one, timesteps),
        "epsilon_after_clip": finite_or_reason(after, one, one, timesteps),
        "mean": variance if isinstance(variance, str) else {"out_grad": variance},
    }


def check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Refuse what is not a number from ``low`` to ``high``; ``above``: or is ``low`` itself."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):
        begin = f"above {low:g}" if above else f"from {low:g}"
        end = " on" if high == math.inf and not above else "" if high == math.inf else f" to {high:g}"
        raise ValueError(f"{name}: expected a number {begin}{end}, got {value!r}")


NO_VARIANCE = "its steps have no variance to shift the mean by; use form='epsilon'"


def finite_or_reason(
    gradient: Mapping[str, Tensor], a: Tensor, a_prev: Tensor, timesteps: Tensor
) -> Mapping[str, Tensor] | str:
    """Return the gradient's columns if they are finite wherever the transition is defined, else the reason."""
    defined = a.isfinite() & a_prev.isfinite()
    bad = torch.stack([~values.isfinite() for values in gradient.values()]).any(0) & defined
    if not bool(bad.any()):
        return gradient
    timestep = timesteps[bad][0].item()
    return f"the schedule has zero signal at timestep {timestep}, where a shift of epsilon moves x_0 without bound"


def check_schedule(schedule: NoiseSchedule) -> None:
    """Refuse anything that is not a NoiseSchedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")


def visited_timesteps(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    spacing: TimestepSpacing,
    steps_offset: int,
    timesteps: Tensor | Sequence[int] | None,
) -> Tensor:
    """Return the timesteps that a solver visits: those given, or as many as asked for."""
    if timesteps is None:
        if num_inference_steps is None:
            raise ValueError("num_inference_steps: expected a number, or timesteps=, got None")
        return schedule.timesteps(num_inference_steps, spacing, steps_offset=steps_offset)
    given = schedule.check_timesteps(timesteps)
    if num_inference_steps is not None and num_inference_steps != len(given):
        raise ValueError(
            f"num_inference_steps: expected {len(given)}, the length of timesteps, got {num_inference_steps}"
        )
    return given
