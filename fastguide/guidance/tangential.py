"""Tangential guidance: the unconditional prediction keeps only what it shares with the conditional one."""

from __future__ import annotations

from typing import Any

from .formulas import Base, begin, check_base, rescaled
from .from_moments import FromMoments, parameters_and_options
from .scales import Scale
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors


def tangential(v: Vectors, guidance_scale: Any, guidance_rescale: Any, base: str) -> Vector:
    """Return ``base + s * (c - u')``, u' being u's part along the first right singular vector of (c, u).

    With ``D = |u|^2 - |c|^2`` and ``h = sqrt(D^2 + 4 <c, u>^2)``, it is ``<c, u> / h * c + (1 + D / h) / 2 * u``: an
    eigenvector of the two rows' Gram matrix, so that no decomposition is needed. ``<c, u> / h - 1/2`` is written
    without the difference of two numbers that nearly agree. For h = 0, where any singular vector would do, u' is u / 2.
    """
    uncond, cond, shift = begin(v)
    inner = v.dot(cond, uncond)
    difference = 0.0 - (2.0 * v.dot(uncond, shift) + v.dot(shift, shift))
    height = v.maximum(v.sqrt(difference * difference + 4.0 * inner * inner), 1e-300)
    near = 0.0 - difference * difference / (2.0 * height * (2.0 * inner + height))
    excess = v.where(inner > 0.0, near, inner / height - 0.5)
    damped = (1.0 + excess + difference / (2.0 * height)) * uncond + (0.5 + excess) * shift
    guided = (damped if base == "uncond" else cond) + guidance_scale * (cond - damped)
    return rescaled(v, guided, cond, guidance_rescale)


class Tangential(FromMoments):
    """Combine the conditional prediction with what the unconditional one shares with it (arXiv 2503.18137).

    ``m = u' + s (c - u')``, u' being the part of u along the first right singular vector of (c, u). Where the
    predictions nearly agree, this is classifier-free guidance at about half the scale.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.
        space: what predictions are taken as: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> Tangential(7.5)
    Tangential(2 predictions)
    """

    def __init__(
        self,
        guidance_scale: Scale,
        *,
        guidance_rescale: Scale = 0.0,
        base: Base = "uncond",
        space: Space | TableSpace = "prediction",
    ) -> None:
        check_base(base)
        parameters, options = parameters_and_options(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        super().__init__(tangential, 2, parameters, options | {"base": base}, space)
