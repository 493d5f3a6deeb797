"""Perturbed guidance: away from what a deliberately weakened model predicts, beside the condition."""

from __future__ import annotations

from typing import Any

from .formulas import Base, begin, check_base, rescaled
from .from_moments import FromMoments, parameters_and_options
from .scales import Scale
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors


def perturbed(
    v: Vectors, guidance_scale: Any, perturbed_guidance_scale: Any, guidance_rescale: Any, base: str
) -> Vector:
    """Return ``base + s * d + s_p * (c - p)``, p being the prediction of a perturbed model."""
    uncond, cond, shift = begin(v)
    start = uncond if base == "uncond" else cond
    guided = start + guidance_scale * shift + perturbed_guidance_scale * (cond - v.predictions[2])
    return rescaled(v, guided, cond, guidance_rescale)


class Perturbed(FromMoments):
    """Combine three predictions: unconditional, conditional, and conditional of a perturbed model (arXiv 2403.17377).

    ``m = u + s (c - u) + s_p (c - p)``. The caller perturbs the model: by identity attention (PAG), blurred attention
    (SEG) or skipped layers (SLG).

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        perturbed_guidance_scale: s_p, likewise.
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.
        space: what predictions are taken as: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> Perturbed(7.5, 3.0)
    Perturbed(3 predictions)
    """

    def __init__(
        self,
        guidance_scale: Scale,
        perturbed_guidance_scale: Scale = 2.8,
        *,
        guidance_rescale: Scale = 0.0,
        base: Base = "uncond",
        space: Space | TableSpace = "prediction",
    ) -> None:
        check_base(base)
        parameters, options = parameters_and_options(
            guidance_scale=guidance_scale,
            perturbed_guidance_scale=perturbed_guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        super().__init__(perturbed, 3, parameters, options | {"base": base}, space)
