"""Adaptive projected guidance: less of what is parallel to the conditional prediction, and no long steps."""

from __future__ import annotations

from typing import Any

from .formulas import LEAST_NORM, Base, begin, check_base, rescaled
from .from_moments import FromMoments, parameters_and_options
from .groups import Dim, dims_of
from .momentum import AddedUp, check_momentum_number
from .scales import Scale
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors


def adaptive_projected(
    v: Vectors, guidance_scale: Any, eta: Any, norm_threshold: Any, guidance_rescale: Any, base: str, momentum: bool
) -> Vector:
    """Return ``base + s * (r - (1 - eta) * <r, c> / <c, c> * c)``, r being no longer than a threshold.

    r is d, or with momentum the sum ``d + momentum * r_before``, which is then the first of the terms (algorithm 1).
    """
    if momentum:
        shift, cond, *unconds = v.predictions
        uncond = unconds[0] if unconds else None
    else:
        uncond, cond, shift = begin(v)
    if norm_threshold is not None:
        shift = v.minimum(1.0, norm_threshold / v.norm(shift)) * shift
    length = v.maximum(v.norm(cond), LEAST_NORM)
    along = v.dot(shift, cond) / (length * length) * cond
    guided = (uncond if uncond is not None and base == "uncond" else cond) + guidance_scale * (
        shift - (1.0 - eta) * along
    )
    return rescaled(v, guided, cond, guidance_rescale)


class AdaptiveProjected(FromMoments):
    """Combine two predictions by what of their difference is not along the conditional one (arXiv 2410.02416).

    ``m = base + s (r - (1 - eta) <r, c> / <c, c> c)``, r being ``c - u``, made no longer than ``norm_threshold``. Large
    scales saturate less. The paper adds to the conditional prediction, ``base="cond"``, and projects in x_0.

    With ``momentum``, r is ``c - u + momentum * r_before``, before it is shortened: what the calls of a loop add up,
    from 0 at its first one on, wherever in the table that is (algorithm 1). ``Sampler`` keeps it; a step of one's own
    is given a ``Momentum``. It is float32, or float64 if the sample is.

    Args:
        guidance_scale: what ``ClassifierFree`` takes.
        eta: how much of what is along the conditional prediction is kept; 1 keeps it all.
        norm_threshold: the most that the difference's norm may be; ``None``: anything.
        momentum: how much is kept of what earlier calls have added up, above -1 and below 1; mostly below 0, which
            damps what they agree on. ``None``: none. Calls outside of ``within`` add nothing.
        norm_dim: the dimensions of a sample that norms and projections are over, as ``dim`` of ``Normalized``, or
            ``None``, the whole sample. The pipeline of ACE-Step has 1, for channels apart in (batch, time, channels).
        guidance_rescale: phi, 0 to 1: how far the guided prediction gets the standard deviation of the conditional one,
            over the whole sample; so not with ``norm_dim``.
        base: what guidance is added to: ``"uncond"``, or ``"cond"`` for a scale that is less by one.
        space: what predictions are taken as: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> AdaptiveProjected(7.5, norm_threshold=10.0), AdaptiveProjected(7.5, momentum=-0.5)
    (AdaptiveProjected(2 predictions), AdaptiveProjected(2 predictions))
    """

    def __init__(
        self,
        guidance_scale: Scale,
        *,
        eta: Scale = 0.0,
        norm_threshold: Scale | None = 15.0,
        momentum: float | None = None,
        norm_dim: Dim | None = None,
        guidance_rescale: Scale = 0.0,
        base: Base = "uncond",
        space: Space | TableSpace = "prediction",
    ) -> None:
        check_base(base)
        parameters, options = parameters_and_options(
            guidance_scale=guidance_scale, eta=eta, norm_threshold=norm_threshold, guidance_rescale=guidance_rescale
        )
        if norm_dim is not None and "guidance_rescale" in parameters:
            raise ValueError("guidance_rescale: expected 0 with norm_dim, as it is of whole samples")
        dims = dims_of("norm_dim", norm_dim)
        options |= {"base": base, "momentum": momentum is not None}
        if momentum is None:
            super().__init__(adaptive_projected, 2, parameters, options, space, dims=dims)
            return
        check_momentum_number(momentum)
        added_up = AddedUp(float(momentum), base == "uncond", space)
        super().__init__(adaptive_projected, 2 + added_up.number, parameters, options, space, added_up, dims)
