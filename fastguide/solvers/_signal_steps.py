"""Where solvers in the logarithm of the signal-to-noise ratio step: levels of noise schedules and of flows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .._counts import check_count, is_integer
from ..schedules.flow import FlowSchedule
from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import Linear, PredictionType, check_prediction_type, original_from
from ..schedules.sigmas import SigmaSpacing, sigmas_at, spaced_sigmas, timesteps_at
from ._columns import NO_VARIANCE, inpainting_columns
from ._options import check_choice, check_idle
from ._unscaled import FinalSigmasType
from .begin import check_begin
from .entries import history_gradients
from .table import StepTable


class SignalSteps(NamedTuple):
    """What a solver visits from its first step on: float64 on the host."""

    levels: Levels
    """Shape (calls + 1,): where each step begins, and where the last one ends."""
    timesteps: Tensor
    """Shape (calls,), int64: what the model is told."""
    skipped: int
    """The number of steps before the first one."""

    @property
    def total(self) -> int:
        """The number of steps, with those before the first."""
        return self.skipped + len(self.timesteps)

    @property
    def here(self) -> Levels:
        """The levels of the calls' samples."""
        return self.levels.at(slice(None, -1))

    @property
    def ends_clean(self) -> bool:
        """Whether the last step leads to x_0."""
        return bool(self.levels.sigma[-1] == 0)


def signal_steps(
    schedule: NoiseSchedule | FlowSchedule,
    num_inference_steps: int | None,
    *,
    timestep_spacing: TimestepSpacing,
    steps_offset: int,
    sigma_spacing: SigmaSpacing | None,
    final_sigmas_type: FinalSigmasType,
    timesteps: Tensor | Sequence[int] | None,
    sigmas: Tensor | Sequence[float] | None,
    mu: float | None,
    begin: int,
    lambda_min_clipped: float = -math.inf,
    flow_from_one: bool = False,
) -> SignalSteps:
    """Return the levels and timesteps that a solver visits, as ``dpm_solver`` describes them.

    Args:
        flow_from_one: whether a flow's sigmas, before they are shifted, begin at 1, as UniPC's do in diffusers, and not
            a training timestep below.
        the others: as in ``dpm_solver``.
    """
    check_choice("final_sigmas_type", final_sigmas_type, FinalSigmasType)
    if isinstance(schedule, FlowSchedule):
        check_idle(
            "a FlowSchedule",
            timesteps=(timesteps, None),
            sigma_spacing=(sigma_spacing, None),
            timestep_spacing=(timestep_spacing, "linspace"),
            steps_offset=(steps_offset, 0),
            lambda_min_clipped=(lambda_min_clipped, -math.inf),
        )
        every, told = _flow_steps(schedule, num_inference_steps, final_sigmas_type, sigmas, mu, flow_from_one)
        levels = Levels.flow_matching(every)
    elif isinstance(schedule, NoiseSchedule):
        check_idle("a NoiseSchedule", sigmas=(sigmas, None), mu=(mu, None))
        if sigma_spacing is None:
            last = _last_timestep(schedule, lambda_min_clipped)
            told = _visited(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps, last)
            begins = sigmas_at(schedule.sigmas, told.double())
        else:
            check_idle("sigma_spacing=", timesteps=(timesteps, None))
            begins, told = _spaced(schedule, num_inference_steps, sigma_spacing)
        final = schedule.sigmas[:1] if final_sigmas_type == "sigma_min" else begins.new_zeros(1)
        every = torch.cat([begins, final])
        alpha = 1 / (every.square() + 1).sqrt()
        levels = Levels(alpha, every * alpha)
    else:
        raise TypeError(f"schedule: expected a NoiseSchedule or a FlowSchedule, got {type(schedule).__name__}")
    check_begin(begin, len(told))
    return SignalSteps(levels.at(slice(begin, None)), told[begin:], begin)


def prediction_of(
    schedule: NoiseSchedule | FlowSchedule, prediction_type: PredictionType | None, levels: Levels
) -> Linear:
    """Return x_0 from the prediction: by default the velocity of a flow, and else epsilon."""
    if prediction_type is None:
        prediction_type = "flow_prediction" if isinstance(schedule, FlowSchedule) else "epsilon"
    check_prediction_type("prediction_type", prediction_type)
    return original_from(prediction_type, levels)


def _flow_steps(
    schedule: FlowSchedule,
    num_inference_steps: int | None,
    final_sigmas_type: FinalSigmasType,
    sigmas: Tensor | Sequence[float] | None,
    mu: float | None,
    from_one: bool,
) -> tuple[Tensor, Tensor]:
    if schedule.invert_sigmas:
        raise ValueError("schedule: expected a flow whose sigmas fall, got one with invert_sigmas")
    if sigmas is None:
        if num_inference_steps is None:
            raise ValueError("num_inference_steps: expected a number, or sigmas=, got None")
        check_count("num_inference_steps", num_inference_steps)
        even = _numpy_linspace(1.0, 1 / len(schedule), num_inference_steps + 1)
        sigmas = even[:-1] if from_one else (1.0 - even).flip(0)[:-1]
    begins = schedule.steps(num_inference_steps, sigmas=sigmas, mu=mu).sigmas[:-1].clone()
    if begins[0] > 1 - 1e-6:  # at 1 there is no signal, and the ratio has no logarithm
        begins[0] -= 1e-6
        if bool((begins.diff() >= 0).any()):
            raise ValueError(f"sigmas: expected the second to be below 1 - 1e-6, got {begins[1].item()!r}")
    final = begins[-1:] if final_sigmas_type == "sigma_min" else begins.new_zeros(1)
    return torch.cat([begins, final]), (begins * len(schedule)).long()


def _numpy_linspace(start: float, stop: float, count: int) -> Tensor:
    """Return evenly spaced numbers with numpy's rounding: in the last digit, which decides what is truncated."""
    values = torch.arange(count, dtype=torch.float64, device="cpu") * ((stop - start) / (count - 1)) + start
    values[-1] = stop
    return values


def _spaced(
    schedule: NoiseSchedule, num_inference_steps: int | None, sigma_spacing: SigmaSpacing
) -> tuple[Tensor, Tensor]:
    """Return sigma / alpha between the schedule's ends, and the timesteps that the model is told."""
    if num_inference_steps is None:
        raise ValueError("num_inference_steps: expected a number, got None")
    check_count("num_inference_steps", num_inference_steps)
    table = schedule.sigmas
    begins = spaced_sigmas(sigma_spacing, num_inference_steps, table[-1].item(), table[0].item())
    told = timesteps_at(table, begins)
    return begins, (told.round() if sigma_spacing == "karras" else told).long()  # diffusers truncates the others


def _last_timestep(schedule: NoiseSchedule, lambda_min_clipped: float) -> int:
    """Return the number of timesteps whose lambda is at least that (Lu et al. 2022, for the cosine schedule)."""
    if isinstance(lambda_min_clipped, bool) or not isinstance(lambda_min_clipped, (int, float)):
        raise TypeError(f"lambda_min_clipped: expected a number, got {lambda_min_clipped!r}")
    kept = int((-schedule.sigmas.log() >= lambda_min_clipped).sum())
    if kept < 2:
        raise ValueError(f"lambda_min_clipped: expected one below most of the schedule's, got {lambda_min_clipped}")
    return kept


def _visited(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    spacing: TimestepSpacing,
    steps_offset: int,
    timesteps: Tensor | Sequence[int] | None,
    last: int,
) -> Tensor:
    """Return timesteps: ``linspace`` and ``leading`` of one more than asked for, without the last (Lu et al. 2022)."""
    if timesteps is not None:
        given = schedule.check_timesteps(timesteps)
        if num_inference_steps is not None and num_inference_steps != len(given):
            raise ValueError(f"num_inference_steps: expected {len(given)}, the timesteps', got {num_inference_steps}")
        return given
    if num_inference_steps is None:
        raise ValueError("num_inference_steps: expected a number, or timesteps=, got None")
    check_count("num_inference_steps", num_inference_steps)
    if not is_integer(steps_offset):
        raise TypeError(f"steps_offset: expected an integer, got {steps_offset!r}")
    if num_inference_steps >= last and spacing != "trailing":
        raise ValueError(f"num_inference_steps: expected fewer than {last}, the timesteps, got {num_inference_steps}")
    if spacing == "linspace":
        steps = torch.linspace(0, last - 1, num_inference_steps + 1, dtype=torch.float64, device="cpu").round().long()
        return schedule.check_timesteps(steps.flip(0)[:-1])
    if spacing == "leading":
        steps = torch.arange(num_inference_steps, 0, -1, device="cpu") * (last // (num_inference_steps + 1))
        return schedule.check_timesteps(steps + steps_offset)
    if spacing == "trailing":
        ratio = len(schedule) / num_inference_steps
        steps = last - torch.arange(math.ceil(last / ratio), dtype=torch.float64, device="cpu") * ratio
        return schedule.check_timesteps(steps.round().long() - 1)
    raise ValueError(f"timestep_spacing: expected one of {get_args(TimestepSpacing)}, got {spacing!r}")


def signal_table(steps: SignalSteps, columns: Mapping[str, Tensor], name: str) -> StepTable:
    """Return the table of these columns, with what all solvers over these levels have in common."""
    noise = columns["out_noise"]
    variance = noise.square() if bool((noise > 0).any()) else NO_VARIANCE
    after = Levels(*(values[1:].clone() for values in steps.levels))
    after.alpha[-1], after.sigma[-1] = 1.0, 0.0  # a known image is clean after the last step
    return StepTable.from_columns(
        steps.timesteps,
        {**columns, **inpainting_columns(after)},
        gradients=history_gradients(columns, steps.here, steps.timesteps, variance),
        levels=steps.here,
        name=name,
    )
