"""Composed guidance: several conditions at once, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .scales import Scale, as_scale, scale_columns
from .weights import Guidance


class Composed(Guidance):
    """Combine several conditions: ``m = uncond + sum_i s_i * (cond_i - uncond)`` (Liu et al. 2022, eq. 11).

    Predictions come in the order unconditional, then one for each scale. A negative scale leads away from its
    condition. Each scale is what ``ClassifierFree`` takes.

    >>> Composed([5.0, 3.0, -1.0]).num_predictions
    4
    """

    def __init__(self, guidance_scales: Sequence[Scale]) -> None:
        if not isinstance(guidance_scales, (Sequence, Tensor)) or len(guidance_scales) == 0:
            raise ValueError(
                f"guidance_scales: expected a sequence of scales, one a condition, got {guidance_scales!r}"
            )
        scales = [as_scale(f"guidance_scales[{i}]", scale) for i, scale in enumerate(guidance_scales)]
        super().__init__(scale_columns(1.0, *scales, 0.0), None)
