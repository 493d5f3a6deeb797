"""CFG-Zero*: the unconditional prediction is scaled to fit the conditional one, sample by sample."""

from __future__ import annotations

from typing import Any

from .._counts import check_count
from .formulas import Base, begin, check_base, rescaled
from .from_moments import FromMoments, parameters_and_options
from .scales import Scale
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors


def zero_star(v: Vectors, guidance_scale: Any, guidance_rescale: Any, base: str, zero_init_steps: int) -> Vector:
    """Return ``a * u + s * (c - a * u)``, or ``c + s * (c - a * u)``, with ``a = <c, u> / (<u, u> + 1e-8)``.

    In the first steps it is 0.
    """
    uncond, cond, _ = begin(v)
    fitted = v.dot(cond, uncond) / (v.dot(uncond, uncond) + 1e-8) * uncond
    guided = (fitted if base == "uncond" else cond) + guidance_scale * (cond - fitted)
    guided = rescaled(v, guided, cond, guidance_rescale)
    return v.where(v.step > zero_init_steps - 0.5, guided, 0.0 * guided) if zero_init_steps else guided


class ZeroStar(FromMoments):
    """Combine two predictions, the unconditional one scaled by ``a = <c, u> / (<u, u> + 1e-8)`` (arXiv 2503.18886).

    ``m = a u + s (c - a u)``: for flow matching, whose unconditional velocity is often too long early on.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one.
        zero_init_steps: so many calls of the model at the beginning of a loop are taken as 0, on whose first velocities
            the paper does not rely.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.
        space: what predictions are taken as: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> ZeroStar(5.0)
    ZeroStar(2 predictions)
    """

    def __init__(
        self,
        guidance_scale: Scale,
        *,
        guidance_rescale: Scale = 0.0,
        zero_init_steps: int = 1,
        base: Base = "uncond",
        space: Space | TableSpace = "prediction",
    ) -> None:
        check_base(base)
        check_count("zero_init_steps", zero_init_steps, 0)
        parameters, options = parameters_and_options(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        super().__init__(zero_star, 2, parameters, options | {"base": base, "zero_init_steps": zero_init_steps}, space)
