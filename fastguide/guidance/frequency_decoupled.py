"""Frequency-decoupled guidance: a scale for each band of frequencies, mostly a larger one for the higher bands."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .formulas import Base, check_base, rescaled
from .low_passes import LowPasses
from .moment_weights import MomentWeights
from .scales import Scale, as_scale, scale_columns, stand_in_columns
from .symbols import Vector, Vectors
from .weights import Guidance


def frequency_decoupled(v: Vectors, guidance_rescale: Any, **guidance_scales: Any) -> Vector:
    """Return ``u + s_0 d + sum_i (s_i - s_{i-1}) B_i d``, rescaled.

    The predictions from the third on are ``u + B_i d``. Band i of d is ``B_i d - B_{i+1} d``, with ``B_0 d = d``, and
    has the scale s_i.
    """
    uncond, cond, *low_passes = v.predictions
    first, *others = guidance_scales.values()
    guided, before = uncond + first * (cond - uncond), first
    for scale, low_pass in zip(others, low_passes, strict=True):
        guided, before = guided + (scale - before) * (low_pass - uncond), scale
    return rescaled(v, guided, cond, guidance_rescale)


class FrequencyDecoupled(Guidance):
    """Combine two predictions with a scale for each band of frequencies (Sadat et al. 2025, arXiv 2506.19713).

    The bands are those of a Laplacian pyramid, each half as fine as the one before, so that
    ``m = u + sum_i s_i band_i(c - u)`` is a sum of u, c, and one more tensor for each band but the first. ``terms``
    makes these of the two, and a step is given all of them; ``Sampler`` does so by itself. They are made by torch's own
    operations, in float32, before the step.

    Args:
        guidance_scales: from the highest frequencies to the lowest, at least two, each what ``ClassifierFree`` takes.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one;
            with up to three bands.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for scales that are less by one.

    >>> import torch
    >>> from fastguide import NoiseSchedule, ddim, guided_step
    >>> guidance = FrequencyDecoupled([10.0, 5.0])
    >>> x, uncond, cond = torch.randn(3, 2, 3, 16, 16)
    >>> guided_step(ddim(NoiseSchedule.linear(), 50), 0, x, guidance.terms([uncond, cond]), guidance).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, guidance_scales: Sequence[Scale], *, guidance_rescale: Scale = 0.0, base: Base = "uncond"
    ) -> None:
        check_base(base)
        if not isinstance(guidance_scales, (Sequence, Tensor)) or len(guidance_scales) < 2:
            raise ValueError(
                f"guidance_scales: expected a sequence of at least two scales, one a band, got {guidance_scales!r}"
            )
        scales = [as_scale(f"guidance_scales[{i}]", scale) for i, scale in enumerate(guidance_scales)]
        if base == "cond":
            scales = [scale + 1.0 for scale in scales]
        low_passes = LowPasses(len(scales) - 1)
        rescale = as_scale("guidance_rescale", guidance_rescale)
        if isinstance(rescale, float) and rescale == 0.0:
            differences = [scale - before for before, scale in itertools.pairwise(scales)]
            super().__init__(scale_columns(1.0, scales[0], *differences, 0.0), None, derived=low_passes)
            return
        parameters = {"guidance_rescale": rescale} | {f"guidance_scale_{i}": scale for i, scale in enumerate(scales)}
        made = MomentWeights.of(frequency_decoupled, len(scales) + 1, parameters)
        columns = stand_in_columns(len(scales) + 1, parameters.values())
        super().__init__(columns, None, made, derived=low_passes)
