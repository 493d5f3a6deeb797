"""Forward noising, training targets and conversions of predictions: rows too, one for each training level."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ..schedules.flow import FlowSchedule
from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import PredictionType, convert, from_original_and_epsilon
from .table import StepTable

Schedule: TypeAlias = NoiseSchedule | FlowSchedule | Levels
"""What a model is trained with: a schedule, or the levels themselves, such as those of EDM."""


def noising_table(schedule: Schedule) -> StepTable:
    """Return x_t = alpha * x_0 + sigma * z (Ho et al. 2020, eq. 4; flows: Lipman et al. 2023); the sample is x_0."""
    alpha, sigma = training_levels(schedule)
    return _table({"out_sample": alpha, "out_noise": sigma}, None, "add_noise")


def target_table(schedule: Schedule, prediction_type: PredictionType) -> StepTable:
    """Return what a perfect model predicts of x_0, which is the sample, and of the noise."""
    of_original, of_noise = from_original_and_epsilon(prediction_type, training_levels(schedule))
    return _table({"out_sample": of_original, "out_noise": of_noise}, None, "training_target")


def conversion_table(schedule: Schedule, source: PredictionType, target: PredictionType) -> StepTable:
    """Return one prediction type from another, at the same sample."""
    part = convert(source, target, training_levels(schedule))
    columns = {"out_sample": part.scale * part.sample, "out_pred": part.scale * part.pred}
    undefined = f"the schedule has zero signal there, where {source} does not determine {target}"
    return _table(columns, undefined, "convert_prediction")


def training_levels(schedule: Schedule) -> Levels:
    """Return the levels that a model is trained at, of shape (levels,), float64 on the host.

    Raises:
        TypeError, ValueError: it is neither a schedule nor two tensors of one shape, finite, and from 0 on.
    """
    if isinstance(schedule, (NoiseSchedule, FlowSchedule)):
        return schedule.levels
    if not isinstance(schedule, Levels):
        raise TypeError(f"schedule: expected a NoiseSchedule, a FlowSchedule or Levels, got {type(schedule).__name__}")
    alpha, sigma = (values.detach().to("cpu", torch.float64) for values in schedule)
    if alpha.shape != sigma.shape or alpha.dim() != 1 or len(alpha) == 0:
        raise ValueError(
            f"schedule: expected levels of one shape (levels,), got {tuple(alpha.shape)} and {tuple(sigma.shape)}"
        )
    for name, values in (("alpha", alpha), ("sigma", sigma)):
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"schedule: expected a finite {name} from 0 on, got {values.tolist()}")
    return Levels(alpha, sigma)


def _table(columns: dict[str, Tensor], undefined: str | None, name: str) -> StepTable:
    timesteps = torch.arange(len(next(iter(columns.values()))), device="cpu")
    return StepTable.from_columns(timesteps, columns, undefined=undefined, name=name)
