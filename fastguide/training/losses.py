"""Losses at random timesteps: a denoiser's, and a noise-aware classifier's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import PredictionType
from ..solvers.noising import Schedule, training_levels
from .forward_process import add_noise, training_target


def denoising_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    original: Tensor,
    *,
    prediction_type: PredictionType = "epsilon",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean squared error of the model's prediction at random timesteps (Ho et al. 2020, eq. 14).

    Args:
        model: ``model(x_t, t)`` for int64 t of shape (batch,); close over the conditions (and drop some of them).
        schedule: the noise schedule; or a flow's, whose ``train_timesteps``, real numbers, t then is; or ``Levels``,
            whose sigma t then is, in float32.
        original: clean data, shape (batch, ...).
        prediction_type: what the model predicts.
        generator: draws timesteps and noise; ``None``: torch's global generator.
    """
    noisy, timestep, noise = _noised(schedule, original, generator)
    target = training_target(schedule, original, timestep, noise, prediction_type)
    return nn.functional.mse_loss(model(noisy, _told(schedule, timestep)), target)


def classifier_loss(
    classifier: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    original: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the cross-entropy of a noise-aware classifier at random timesteps (Dhariwal & Nichol 2021, section 4).

    Args:
        classifier: ``classifier(x_t, t) -> logits`` of shape (batch, classes), for int64 t of shape (batch,).
        schedule: the noise schedule; or a flow's, whose ``train_timesteps``, real numbers, t then is; or ``Levels``,
            whose sigma t then is, in float32.
        original: clean data, shape (batch, ...).
        labels: int64 of shape (batch,).
        generator: draws timesteps and noise; ``None``: torch's global generator.
    """
    noisy, timestep, _ = _noised(schedule, original, generator)
    return nn.functional.cross_entropy(classifier(noisy, _told(schedule, timestep)), labels)


def _noised(schedule: Schedule, original: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    device = original.device
    levels = len(training_levels(schedule).sigma)
    timestep = torch.randint(levels, original.shape[:1], device=device, generator=generator)
    noise = torch.randn(original.shape, dtype=original.dtype, device=device, generator=generator)
    return add_noise(schedule, original, timestep, noise), timestep, noise


def _told(schedule: Schedule, timestep: Tensor) -> Tensor:
    """Return what the model is told of a training timestep's index: float32 for a flow, and for levels their sigma."""
    if isinstance(schedule, NoiseSchedule):
        return timestep
    told = schedule.sigma if isinstance(schedule, Levels) else schedule.train_timesteps
    return told.to(timestep.device, torch.float32)[timestep]
