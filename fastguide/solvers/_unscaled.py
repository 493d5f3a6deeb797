"""What solvers of unscaled samples, x = x_0 + sigma * epsilon, share: their sigmas, the churn, and Euler's row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._counts import check_count
from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import Linear
from ..schedules.sigmas import SigmaSpacing, given_sigmas, sigmas_at, spaced_sigmas, timesteps_at
from ._columns import check_range, check_schedule
from ._options import check_choice

FinalSigmasType: TypeAlias = Literal["zero", "sigma_min"]
TimestepType: TypeAlias = Literal["discrete", "continuous"]


class SigmaSteps(NamedTuple):
    """What a solver visits: float64 on the host."""

    sigmas: Tensor
    """Shape (calls + 1,), falling: where each step begins, and where the last one ends."""
    timesteps: Tensor
    """Shape (calls,): what the model is told."""


class Churn(NamedTuple):
    """Noise that is added before a step, which then begins at a higher sigma (Karras et al. 2022, algorithm 2)."""

    sigmas: Tensor
    """Where the steps begin after it, shape (calls,)."""
    noise: Tensor
    """The standard deviation of what is added."""


def schedule_steps(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    *,
    timestep_spacing: TimestepSpacing,
    steps_offset: int,
    timesteps: Tensor | Sequence[float] | None,
    sigmas: Tensor | Sequence[float] | None = None,
    sigma_spacing: SigmaSpacing | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: FinalSigmasType = "zero",
) -> SigmaSteps:
    """Return the sigmas and real timesteps of a noise schedule that a solver visits, as ``euler`` describes them."""
    check_schedule(schedule)
    check_choice("final_sigmas_type", final_sigmas_type, FinalSigmasType)
    table = schedule.sigmas
    if sigmas is not None:
        _check_alone("sigmas", sigma_spacing=sigma_spacing, timesteps=timesteps)
        begins = given_sigmas("sigmas", sigmas, least=2, zero_last=True)
        _check_number(num_inference_steps, len(begins) - 1, "the number of sigmas but the last")
        return SigmaSteps(begins, timesteps_at(table, begins[:-1]))
    if timesteps is not None:
        _check_alone("timesteps", sigma_spacing=sigma_spacing)
        told = _given_timesteps(schedule, timesteps)
        _check_number(num_inference_steps, len(told), "the length of timesteps")
    else:
        told = _real_timesteps(schedule, num_inference_steps, timestep_spacing, steps_offset)
    begins = sigmas_at(table, told)
    if sigma_spacing is not None:
        high = begins[0].item() if sigma_max is None else sigma_max
        low = begins[-1].item() if sigma_min is None else sigma_min
        begins = spaced_sigmas(sigma_spacing, len(begins), high, low)
        told = timesteps_at(table, begins)
    elif sigma_min is not None or sigma_max is not None:
        raise ValueError("sigma_spacing: expected one with sigma_min= or sigma_max=, got None")
    final = table[:1] if final_sigmas_type == "sigma_min" else table.new_zeros(1)
    every = torch.cat([begins, final])
    if bool((begins.diff() >= 0).any()) or bool(every[-1] > every[-2]):
        raise ValueError(f"sigmas: expected falling values, got {every.tolist()}")
    return SigmaSteps(every, told)


def _real_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int | None, spacing: TimestepSpacing, steps_offset: int
) -> Tensor:
    """Return the timesteps of a spacing; those of ``linspace`` are real numbers here, and not rounded."""
    if num_inference_steps is None:
        raise ValueError("num_inference_steps: expected a number, or timesteps=, got None")
    if spacing != "linspace":
        return schedule.timesteps(num_inference_steps, spacing, steps_offset=steps_offset).double()
    check_count("num_inference_steps", num_inference_steps)
    last = len(schedule) - 1 if num_inference_steps > 1 else 0  # one step of a linspace is its first point, 0
    return torch.linspace(last, 0, num_inference_steps, dtype=torch.float64, device="cpu")


def _given_timesteps(schedule: NoiseSchedule, timesteps: Tensor | Sequence[float]) -> Tensor:
    told = given_sigmas("timesteps", timesteps, zero_last=True)
    if told[0] > len(schedule) - 1:
        raise ValueError(f"timesteps: expected values from 0 to {len(schedule) - 1}, got {told.tolist()}")
    return told


def _check_alone(name: str, **others: object) -> None:
    for other, value in others.items():
        if value is not None:
            raise ValueError(f"{other}: expected None with {name}=, got {value!r}")


def _check_number(num_inference_steps: int | None, count: int, of_what: str) -> None:
    if num_inference_steps is not None and num_inference_steps != count:
        raise ValueError(f"num_inference_steps: expected {count}, {of_what}, got {num_inference_steps}")


def told_timesteps(steps: SigmaSteps, timestep_type: TimestepType) -> Tensor:
    """Return the timesteps, or, ``continuous``, EDM's logarithms (Karras et al. 2022, table 1)."""
    check_choice("timestep_type", timestep_type, TimestepType)
    return steps.timesteps if timestep_type == "discrete" else steps.sigmas[:-1].log() / 4


def init_noise_sigma(steps: SigmaSteps, spacing: TimestepSpacing) -> float:
    """Return the first sigma; with ``leading``, the deviation of samples there, as diffusers does."""
    first = steps.sigmas[0].item()
    return math.hypot(first, 1.0) if spacing == "leading" else first


def churn(sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Churn:
    """Return where the steps begin after the noise of Karras et al. 2022, algorithm 2, lines 4 to 6."""
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        check_range(name, value, 0.0, math.inf)
    check_range("s_tmax", s_tmax, s_tmin, math.inf)
    now = sigmas[:-1]
    gamma = min(s_churn / len(now), math.sqrt(2) - 1)
    hat = torch.where((now >= s_tmin) & (now <= s_tmax), now * (gamma + 1), now)
    return Churn(hat, s_noise * (hat.square() - now.square()).clamp(min=0).sqrt())


def euler_columns(churned: Churn, target: Tensor, x0: Linear, epsilon: Tensor | None) -> dict[str, Tensor]:
    """Return Euler's row over the slope (x - x_0) / sigma, which is epsilon (Karras et al. 2022, eq. 3 and 4).

    Args:
        churned: where the steps begin.
        target: the sigmas that they lead to.
        x0: the conversion of the prediction.
        epsilon: what the prediction is multiplied by to be epsilon; ``None``: epsilon is the slope towards x_0.
    """
    # x' = x + (target - sigma) * epsilon, or target / sigma * x + (1 - target / sigma) * x_0; x has the churn's noise
    now, noise = churned
    in_x0 = x0.scale * x0.sample
    columns = x0.columns() | {"x0_noise": noise * in_x0}
    if epsilon is not None:
        return columns | {"out_sample": torch.ones_like(now), "out_pred": (target - now) * epsilon, "out_noise": noise}
    ratio = target / now
    passed_on = ratio + (1 - ratio) * in_x0  # of the noise: as a part of x, and of x_0
    return columns | {"out_sample": ratio, "out_x0": 1 - ratio, "out_noise": noise * passed_on}


def loop_columns(sigmas: Tensor, data: float = 1.0) -> tuple[dict[str, Tensor], float]:
    """Return the columns of inpainting and of the model's input, and the scale of the first input.

    The input is ``x / sqrt(sigma^2 + data^2)`` (Karras et al. 2022, table 1); data: the deviation of x_0.
    """
    after = torch.cat([sigmas[1:-1], sigmas.new_zeros(1)])  # a known image is clean after the last step
    levels = Levels.variance_exploding(after)
    in_scale = (sigmas.square() + data**2).rsqrt()
    columns = {"known_sample": levels.alpha, "known_noise": levels.sigma, "in_scale": in_scale[1:].clone()}
    columns["in_scale"][-1] = 1.0  # no call is after the last
    return columns, in_scale[0].item()
