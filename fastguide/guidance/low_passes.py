"""Make what frequency-decoupled guidance weighs beside the predictions: their difference without higher frequencies.

A pyramid as OpenCV's and kornia's: a level is half as large as the one before, after a blur with the binomial of 5x5;
on the way up, each is interpolated to the size of the level above, and blurred again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = 3
"""The least height and width of a level that is blurred, as its edges are reflected by two pixels."""
_binomials: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class LowPasses(NamedTuple):
    """Tensors ``u + B_i (c - u)``, for i from 1 on, where B_i leaves out the i highest of the frequencies' bands."""

    number: int

    @property
    def kind(self) -> LowPasses:
        """What a loop's buffers depend on."""
        return self

    def extended(self, predictions: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return the two predictions and the tensors, which are in float32, or in float64 if the predictions are.

        Args:
            predictions: unconditional, conditional, each of shape (batch, ..., height, width); or one tensor of both
                along the batch.

        Raises:
            ValueError: there are not two, or they are too small for so many levels.
        """
        if isinstance(predictions, Tensor):
            predictions = predictions.chunk(2)
        elif len(predictions) == 1:
            predictions = predictions[0].chunk(2)
        if len(predictions) != 2:
            raise ValueError(f"predictions: expected two, unconditional and conditional, got {len(predictions)}")
        uncond, cond = predictions
        sizes = self._sizes(uncond)
        dtype = torch.float64 if uncond.dtype == torch.float64 else torch.float32
        base = uncond.to(dtype)
        shift = (cond.to(dtype) - base).reshape(-1, 1, *sizes[0])
        made = []
        for level, size in enumerate(sizes[1:], 1):
            shift = functional.interpolate(_blurred(shift), size=size, mode="bilinear", align_corners=False)
            low = shift
            for above in reversed(sizes[:level]):
                low = _blurred(functional.interpolate(low, size=above, mode="bilinear", align_corners=False))
            made.append(base + low.view_as(base))
        return [uncond, cond, *made]

    def _sizes(self, prediction: Tensor) -> list[tuple[int, int]]:
        if prediction.dim() < 3:
            raise ValueError(f"predictions: expected shape (batch, ..., height, width), got {tuple(prediction.shape)}")
        sizes = [(prediction.shape[-2], prediction.shape[-1])]
        for _ in range(self.number):
            if min(sizes[-1]) < 2 * _SMALLEST:
                raise ValueError(
                    f"predictions: expected at least {2 * _SMALLEST} by {2 * _SMALLEST} pixels at each level of "
                    f"{self.number + 1} but the lowest, got {tuple(prediction.shape[-2:])}"
                )
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
        return sizes


def _blurred(images: Tensor) -> Tensor:
    """Blur images of one channel; what is beyond their edges is reflected."""
    return functional.conv2d(functional.pad(images, (2, 2, 2, 2), "reflect"), _binomial(images))


def _binomial(like: Tensor) -> Tensor:
    """Return the weights of the blur, which are on a device from the first use on."""
    key = like.device, like.dtype
    weights = _binomials.get(key)
    if weights is None:
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64, device="cpu")
        weights = _binomials[key] = (line.outer(line) / 256).to(like.device, like.dtype)[None, None]
    return weights
