"""Normalized guidance: the guided prediction gets the norm of the conditional one, or at most some times that."""

from __future__ import annotations

from typing import Any

from .formulas import LEAST_NORM, Base, begin, check_base
from .from_moments import FromMoments, parameters_and_options
from .groups import Dim, dims_of
from .scales import Scale
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors


def normalized(v: Vectors, guidance_scale: Any, at_most: Any, base: str) -> Vector:
    """Return ``|c| / |m| * m`` with ``m = base + s * d``, or ``min(1, at_most * |c| / |m|) * m``."""
    uncond, cond, shift = begin(v)
    guided = (uncond if base == "uncond" else cond) + guidance_scale * shift
    ratio = v.norm(cond) / v.maximum(v.norm(guided), LEAST_NORM)
    result: Vector = (ratio if at_most is None else v.minimum(1.0, at_most * ratio)) * guided
    return result


class Normalized(FromMoments):
    """Combine two predictions, and give the result the norm of the conditional one: of the sample, or of each token.

    ``m = u + s (c - u)``, times ``|c| / |m|``. With a limit, it is only shortened, to ``at_most`` times that norm, as
    the pipeline of Z-Image does. With ``dim=-1``, each token of (batch, tokens, channels) gets a factor of its own, as
    in the pipelines of Qwen-Image, or, with a limit of 1, of LongCat-Image.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        dim: the dimensions of a sample that norms are over, counted with the batch, or from the last one, -1. There is
            a factor for each place in the others. ``None``: over the whole sample. Where a group's elements do not lie
            one after the other, torch's own operations make the guided prediction before the step.
        at_most: how many times as long as the conditional prediction the result may be; ``None``: it is as long.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.
        space: what predictions are taken as: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> Normalized(4.0), Normalized(4.0, dim=-1, at_most=1.0)
    (Normalized(2 predictions), Normalized(2 predictions, dim=-1))
    """

    def __init__(
        self,
        guidance_scale: Scale,
        *,
        dim: Dim | None = None,
        at_most: Scale | None = None,
        base: Base = "uncond",
        space: Space | TableSpace = "prediction",
    ) -> None:
        check_base(base)
        parameters, options = parameters_and_options(guidance_scale=guidance_scale, at_most=at_most)
        super().__init__(normalized, 2, parameters, options | {"base": base}, space, dims=dims_of("dim", dim))
