"""Forward noising, training targets and conversions of predictions: rows too, one for each training timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedules.flow import FlowSchedule
from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import PredictionType, convert, from_original_and_epsilon
from .table import StepTable


def noising_table(schedule: NoiseSchedule | FlowSchedule) -> StepTable:
    """Return x_t = alpha * x_0 + sigma * z (Ho et al. 2020, eq. 4; flows: Lipman et al. 2023); the sample is x_0."""
    _check_schedule(schedule)
    alpha, sigma = schedule.levels
    return _table(schedule, {"out_sample": alpha, "out_noise": sigma}, None, "add_noise")


def target_table(schedule: NoiseSchedule | FlowSchedule, prediction_type: PredictionType) -> StepTable:
    """Return what a perfect model predicts of x_0, which is the sample, and of the noise."""
    _check_schedule(schedule)
    of_original, of_noise = from_original_and_epsilon(prediction_type, schedule.levels)
    return _table(schedule, {"out_sample": of_original, "out_noise": of_noise}, None, "training_target")


def conversion_table(
    schedule: NoiseSchedule | FlowSchedule, source: PredictionType, target: PredictionType
) -> StepTable:
    """Return one prediction type from another, at the same sample."""
    _check_schedule(schedule)
    part = convert(source, target, schedule.levels)
    columns = {"out_sample": part.scale * part.sample, "out_pred": part.scale * part.pred}
    undefined = f"the schedule has zero signal there, where {source} does not determine {target}"
    return _table(schedule, columns, undefined, "convert_prediction")


def _check_schedule(schedule: NoiseSchedule | FlowSchedule) -> None:
    if not isinstance(schedule, (NoiseSchedule, FlowSchedule)):
        raise TypeError(f"schedule: expected a NoiseSchedule or a FlowSchedule, got {type(schedule).__name__}")


def _table(
    schedule: NoiseSchedule | FlowSchedule, columns: dict[str, Tensor], undefined: str | None, name: str
) -> StepTable:
    timesteps = torch.arange(len(schedule), device="cpu")
    return StepTable.from_columns(timesteps, columns, undefined=undefined, name=name)
