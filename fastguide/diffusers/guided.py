"""Stand for what a guider makes of its model's outputs by weights from moments, which the step itself makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..guidance import Guidance
from .lazy_tensor import LazyTensor
from .traced import WRITTEN_TO


class Guided(LazyTensor):
    """A guider's result, which is computed when anything but a step asks for it.

    Args:
        predictions: the model's outputs, in the order of the guidance's weights.
        guidance: makes the result of them.
        compute: computes it without a step.
    """

    __slots__ = ("_compute_it", "_versions", "guidance", "predictions")

    def __init__(self, predictions: tuple[Tensor, ...], guidance: Guidance, compute: Callable[[], Tensor]) -> None:
        self._value = None
        self.predictions, self.guidance = predictions, guidance
        self._compute_it = compute
        self._versions = tuple([prediction._version for prediction in predictions])

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor that it stands for."""
        return self.predictions[0].dtype

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        return self.predictions[0]

    def is_pending(self) -> bool:
        """Tell whether nobody has seen its values."""
        return self._value is None

    def check_unchanged(self) -> None:
        """Refuse outputs that are not what they were.

        Raises:
            RuntimeError: one has been written to since.
        """
        if tuple([prediction._version for prediction in self.predictions]) != self._versions:
            raise RuntimeError(f"the model's output {WRITTEN_TO}")

    def _compute(self) -> Tensor:
        self.check_unchanged()
        return self._compute_it()


def may_be_traced(prediction: object) -> bool:
    """Tell whether a model's output is a plain tensor, of which nobody wants to see every operation."""
    if type(prediction) is not Tensor or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and prediction.requires_grad)


def may_wait(prediction: Tensor) -> bool:
    """Tell whether a model's output can be left to the step: torch counts who writes to it."""
    return may_be_traced(prediction) and prediction.is_floating_point() and not prediction.is_inference()
