"""Conditions that are dropped in training, so that one model learns the unconditional prediction as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    """A module that drops conditions in training, for a learnable null condition; in evaluation it drops none.

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
        """Return the condition, shape (batch, *condition_shape), replaced for some samples in training."""
        return drop_condition(condition, self.null_condition, self.p_uncond) if self.training else condition

    def null(self, batch: int) -> Tensor:
        """Return the null condition for a batch, with which the unconditional prediction is made."""
        return self.null_condition.expand(batch, *self.null_condition.shape)
