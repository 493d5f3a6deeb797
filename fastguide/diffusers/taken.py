"""Say what a step takes of what a pipeline has combined of its model's outputs: predictions, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance


class Taken(NamedTuple):
    """What a step takes of a pipeline's combination."""

    predictions: tuple[Tensor, ...]
    variance: Tensor | None
    """That the model learned."""
    dtype: torch.dtype
    """Of the combination, as diffusers would have computed it."""


Output = Tensor | Taken
"""A model's output: one tensor, or several predictions."""


class Weights(NamedTuple):
    """The coefficients of several predictions, ``constants + factors * scale``."""

    constants: tuple[float, ...]
    factors: tuple[float, ...] = ()
    scale: Tensor | None = None
    is_guidance: bool = True
    """Whether more than one of the predictions is a model's output, and none only a tensor that was added to it."""


class PerFrame(NamedTuple):
    """A scale for each frame of each sample, or weights for each channel of each."""

    scale: Tensor | Guidance
    """Flattened."""
    lead: int
    """How many dimensions of the sample it is for."""
