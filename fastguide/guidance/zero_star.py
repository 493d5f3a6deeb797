"""CFG-Zero*: the unconditional prediction is scaled to fit the conditional one, sample by sample."""

from __future__ import annotations

from typing import Any

from .formulas import Base, begin, check_base, rescaled
from .from_moments import FromMoments, parameters_and_options
from .scales import Scale
from .symbols import Vector, Vectors


def zero_star(v: Vectors, guidance_scale: Any, guidance_rescale: Any, base: str) -> Vector:
    """Return ``a * u + s * (c - a * u)``, or ``c + s * (c - a * u)``, with ``a = <c, u> / (<u, u> + 1e-8)``."""
    uncond, cond, _ = begin(v)
    fitted = v.dot(cond, uncond) / (v.dot(uncond, uncond) + 1e-8) * uncond
    guided = (fitted if base == "uncond" else cond) + guidance_scale * (cond - fitted)
    return rescaled(v, guided, cond, guidance_rescale)


class ZeroStar(FromMoments):
    """Combine two predictions, the unconditional one scaled by ``a = <c, u> / (<u, u> + 1e-8)`` (arXiv 2503.18886).

    ``m = a u + s (c - a u)``: for flow matching, whose unconditional velocity is often too long early on.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.

    >>> ZeroStar(5.0)
    ZeroStar(2 predictions)
    """

    def __init__(self, guidance_scale: Scale, *, guidance_rescale: Scale = 0.0, base: Base = "uncond") -> None:
        check_base(base)
        parameters, options = parameters_and_options(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        super().__init__(zero_star, 2, parameters, options | {"base": base})
