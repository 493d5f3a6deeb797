"""What guidance asks of training: dropped conditions, a denoiser's loss, and a noise-aware classifier's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import PredictionType
from .forward_process import add_noise, training_target


def drop_condition(
    condition: Tensor, null_condition: Tensor, p_uncond: float = 0.1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each sample's condition by the null condition with probability ``p_uncond`` (Ho & Salimans 2022, alg. 1).

    Args:
        condition: shape (batch, ...); class labels of shape (batch,) too.
        null_condition: what broadcasts to one sample's condition; for labels, a 0-d tensor with the extra class.
        p_uncond: usually 0.1 to 0.2.
        generator: draws the choice; ``None``: torch's global generator.

    >>> labels = torch.arange(5)
    >>> drop_condition(labels, torch.tensor(10), 1.0)
    tensor([10, 10, 10, 10, 10])
    """
    if not 0.0 <= p_uncond <= 1.0:
        raise ValueError(f"p_uncond: expected a probability, got {p_uncond!r}")
    for name, tensor in (("condition", condition), ("null_condition", null_condition)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if null_condition.is_floating_point() and not condition.is_floating_point():
        raise TypeError(
            f"null_condition: expected {condition.dtype}, the condition's dtype, got {null_condition.dtype}"
        )
    if condition.dim() == 0:
        raise ValueError("condition: expected shape (batch, ...), got a tensor without dimensions")
    dropped = torch.rand(condition.shape[0], device=condition.device, generator=generator) < p_uncond
    mask = dropped.view(-1, *[1] * (condition.dim() - 1))
    return torch.where(mask, null_condition.to(condition.dtype), condition)


class ConditionDropout(nn.Module):
    """Drops conditions in training, for a learnable null condition; in evaluation it leaves them as they are.

    Args:
        condition_shape: shape of one sample's condition.
        p_uncond: probability of dropping, usually 0.1 to 0.2.

    >>> dropout = ConditionDropout((16,), p_uncond=0.15)
    >>> dropout(torch.randn(4, 16)).shape, dropout.null(4).shape
    (torch.Size([4, 16]), torch.Size([4, 16]))
    """

    def __init__(self, condition_shape: tuple[int, ...], p_uncond: float = 0.1) -> None:
        super().__init__()
        if not isinstance(condition_shape, (tuple, list)):
            raise TypeError(f"condition_shape: expected a tuple, got {type(condition_shape).__name__}")
        if not 0.0 <= p_uncond <= 1.0:
            raise ValueError(f"p_uncond: expected a probability, got {p_uncond!r}")
        self.p_uncond = p_uncond
        self.null_condition = nn.Parameter(torch.randn(condition_shape) * 0.02)

    def forward(self, condition: Tensor) -> Tensor:
        """The condition, shape (batch, *condition_shape), dropped here and there in training."""
        return drop_condition(condition, self.null_condition, self.p_uncond) if self.training else condition

    def null(self, batch: int) -> Tensor:
        """The null condition for a batch: what the unconditional prediction is made with."""
        return self.null_condition.expand(batch, *self.null_condition.shape)


def denoising_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    original: Tensor,
    *,
    prediction_type: PredictionType = "epsilon",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the model's prediction at random timesteps (Ho et al. 2020, eq. 14).

    Args:
        model: ``model(x_t, t)`` for int64 t of shape (batch,); close over the conditions (and drop some of them).
        schedule: the noise schedule.
        original: clean data, shape (batch, ...).
        prediction_type: what the model predicts.
        generator: draws timesteps and noise; ``None``: torch's global generator.
    """
    noisy, timestep, noise = _noised(schedule, original, generator)
    target = training_target(schedule, original, timestep, noise, prediction_type)
    return nn.functional.mse_loss(model(noisy, timestep), target)


def classifier_loss(
    classifier: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    original: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy of a noise-aware classifier at random timesteps (Dhariwal & Nichol 2021, section 4).

    Args:
        classifier: ``classifier(x_t, t) -> logits`` of shape (batch, classes), for int64 t of shape (batch,).
        schedule: the noise schedule.
        original: clean data, shape (batch, ...).
        labels: int64 of shape (batch,).
        generator: draws timesteps and noise; ``None``: torch's global generator.
    """
    noisy, timestep, _ = _noised(schedule, original, generator)
    return nn.functional.cross_entropy(classifier(noisy, timestep), labels)


def _noised(
    schedule: NoiseSchedule, original: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = original.device
    timestep = torch.randint(len(schedule), original.shape[:1], device=device, generator=generator)
    noise = torch.randn(original.shape, dtype=original.dtype, device=device, generator=generator)
    return add_noise(schedule, original, timestep, noise), timestep, noise
