"""Autoguidance: away from what a weaker version of the model predicts for the same condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .classifier_free import ClassifierFree


class AutoGuidance(ClassifierFree):
    """Combine two predictions of one condition: ``m = weak + guidance_scale * (strong - weak)`` (arXiv 2406.02507).

    Predictions come in the order weak, strong; the weak one is of a smaller or less trained model. Scale 1 is the
    strong model alone. Arguments are those of ``ClassifierFree``.

    >>> AutoGuidance(2.0)
    AutoGuidance(2 predictions)
    """

    @staticmethod
    def both(weak: Callable[..., Tensor], strong: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a model for ``Sampler`` that calls two: the weak one for the first condition, the other for the next.

        ``Sampler`` gives it both along the batch, so that it has to be ``batched``, and not to share predictions with
        other processes, which take a model each. ``uncond`` and ``cond`` are the same condition, or both left out if
        the models take none.

        Args:
            weak, strong: called as ``Sampler`` calls a model, each with its half of the batch.

        >>> from fastguide import NoiseSchedule, Sampler, ddim
        >>> model = AutoGuidance.both(lambda x, t, y: 0.1 * x, lambda x, t, y: 0.2 * x)
        >>> digits = torch.tensor([3, 7])
        >>> sampler = Sampler(model, ddim(NoiseSchedule.linear(), 5), AutoGuidance(2.0))
        >>> sampler(torch.randn(2, 4), cond=digits, uncond=digits).shape
        torch.Size([2, 4])
        """

        def model(*arguments: Any, **named: Any) -> Tensor:
            made = [
                each(*_half(arguments, number), **_half(named, number)) for number, each in enumerate((weak, strong))
            ]
            return torch.cat(made)

        model.takes_all_predictions = True  # type: ignore[attr-defined]
        return model


def _half(value: Any, number: int) -> Any:
    """Return one half of the batch of all tensors in a value."""
    if isinstance(value, Mapping):
        return {name: _half(each, number) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_half(each, number) for each in value)
    return value.chunk(2)[number] if isinstance(value, Tensor) and value.dim() else value
