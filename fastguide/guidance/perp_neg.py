"""Perp-Neg: a negative prompt of which only what is perpendicular to the positive one counts."""

from __future__ import annotations

from typing import Any

from .formulas import LEAST_NORM, rescaled
from .from_moments import FromMoments, parameters_and_options
from .scales import Scale
from .symbols import Vector, Vectors


def perp_neg(v: Vectors, guidance_scale: Any, neg_scale: Any, guidance_rescale: Any) -> Vector:
    """Return ``e + s * (p - k * (n - <n, p> / <p, p> * p))``, p and n being predictions less the empty prompt's e."""
    empty, cond, negative = v.predictions
    positive, negative = cond - empty, negative - empty
    length = v.maximum(v.norm(positive), LEAST_NORM)
    perpendicular = negative - v.dot(negative, positive) / (length * length) * positive
    return rescaled(v, empty + guidance_scale * (positive - neg_scale * perpendicular), cond, guidance_rescale)


class PerpNeg(FromMoments):
    """Combine three predictions: of the empty prompt, the positive and the negative one (arXiv 2304.04968).

    ``m = e + s (p - k (n - <n, p> / <p, p> p))``, with ``p = c_pos - e`` and ``n = c_neg - e``: what the negative
    prompt shares with the positive one is not taken away.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        neg_scale: k, likewise.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one.

    >>> PerpNeg(8.0)
    PerpNeg(3 predictions)
    """

    def __init__(self, guidance_scale: Scale, neg_scale: Scale = 1.0, *, guidance_rescale: Scale = 0.0) -> None:
        parameters, options = parameters_and_options(
            guidance_scale=guidance_scale, neg_scale=neg_scale, guidance_rescale=guidance_rescale
        )
        super().__init__(perp_neg, 3, parameters, options)
