"""Magnitude-aware guidance: a lower scale where the predictions are far from each other."""

from __future__ import annotations

from typing import Any

from .formulas import LEAST_NORM, Base, begin, check_base, rescaled
from .from_moments import FromMoments, parameters_and_options
from .scales import Scale
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors


def magnitude_aware(v: Vectors, guidance_scale: Any, alpha: Any, guidance_rescale: Any, base: str) -> Vector:
    """Return ``u + (1 + (s - 1) * exp(-alpha * |d| / |u|)) * d``, or ``c + s * exp(-alpha * |d| / |u|) * d``."""
    uncond, cond, shift = begin(v)
    damping = v.exp(0.0 - alpha * v.norm(shift) / v.maximum(v.norm(uncond), LEAST_NORM))
    if base == "uncond":
        guided = uncond + (1.0 + (guidance_scale - 1.0) * damping) * shift
    else:
        guided = cond + guidance_scale * damping * shift
    return rescaled(v, guided, cond, guidance_rescale)


class MagnitudeAware(FromMoments):
    """Combine two predictions, with less guidance the longer their difference is (arXiv 2508.03442).

    ``m = u + (1 + (s - 1) exp(-alpha |c - u| / |u|)) (c - u)``: large scales do not overshoot in the first steps.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        alpha: how fast the scale falls with the difference's length.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.
        space: what predictions are taken as: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> MagnitudeAware(10.0)
    MagnitudeAware(2 predictions)
    """

    def __init__(
        self,
        guidance_scale: Scale,
        *,
        alpha: Scale = 8.0,
        guidance_rescale: Scale = 0.0,
        base: Base = "uncond",
        space: Space | TableSpace = "prediction",
    ) -> None:
        check_base(base)
        parameters, options = parameters_and_options(
            guidance_scale=guidance_scale, alpha=alpha, guidance_rescale=guidance_rescale
        )
        super().__init__(magnitude_aware, 2, parameters, options | {"base": base}, space)
