"""Classifier-free guidance: the conditional prediction is amplified against the unconditional one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .formulas import begin, check_space, rescaled
from .moment_weights import MomentWeights
from .plus_plus import FirstOrder, plus_plus_scales
from .scales import Scale, as_scale, as_scale_per_step, scale_columns, stand_in_columns
from .spaces import TableSpace
from .symbols import Space, Vector, Vectors
from .weights import Guidance


def classifier_free(v: Vectors, guidance_scale: Any, guidance_rescale: Any) -> Vector:
    """Return ``u + s * d``, rescaled."""
    uncond, cond, shift = begin(v)
    return rescaled(v, uncond + guidance_scale * shift, cond, guidance_rescale)


class ClassifierFree(Guidance):
    """Combine two predictions: ``m = uncond + guidance_scale * (cond - uncond)`` (Ho & Salimans 2022, eq. 6).

    Predictions come in the order unconditional, conditional; for a negative prompt, its prediction takes the place
    of the unconditional one. Scale 0 is unconditional, 1 conditional, more amplifies, less than 0 leads away.

    Args:
        guidance_scale: a number; or one per sample, a sequence or tensor of shape ``(batch,)``; or one per step, a
            tensor of shape ``(steps, 1)``, or ``(steps, batch)`` for both; for a sliced table, those of its steps. A
            guidance interval is a column of scales that are 1 (or 0) outside of it. A tensor may live on the device;
            its values are then not checked, as that would wait for the device.
        guidance_rescale: phi, 0 to 1, likewise: how far the guided prediction gets the standard deviation of the
            conditional one, ``phi std(cond) / std(m) m + (1 - phi) m`` (Lin et al. 2023, section 3.4).
        space: whose deviations these are: ``"prediction"``, what the model predicts, ``"original"``, x_0, or of
            ``space_of``.

    >>> ClassifierFree(7.5), ClassifierFree([3.0, 7.5]).batch, ClassifierFree.per_step([1.0, 7.5, 1.0]).steps
    (ClassifierFree(2 predictions), 2, 3)
    """

    def __init__(
        self, guidance_scale: Scale, *, guidance_rescale: Scale = 0.0, space: Space | TableSpace = "prediction"
    ) -> None:
        check_space(space)
        scale = as_scale("guidance_scale", guidance_scale)
        rescale = as_scale("guidance_rescale", guidance_rescale)
        if isinstance(rescale, float) and rescale == 0.0:
            super().__init__(scale_columns(1.0, scale, 0.0), None)
            return
        parameters = {"guidance_scale": scale, "guidance_rescale": rescale}
        weights_from = MomentWeights.of(classifier_free, 2, parameters, space=space)
        super().__init__(stand_in_columns(2, weights_from.scales), None, weights_from)

    @classmethod
    def from_w(cls, w: Scale, *, guidance_rescale: Scale = 0.0) -> ClassifierFree:
        """Return the paper's own form, ``(1 + w) * cond - w * uncond``, which is ``guidance_scale = 1 + w``."""
        return cls(as_scale("w", w) + 1, guidance_rescale=guidance_rescale)

    @classmethod
    def plus_plus(cls, table: FirstOrder, guidance_scale: float) -> ClassifierFree:
        """Return CFG++: x_0 is guided, and the noise is the unconditional prediction's (arXiv 2406.08070).

        Without a clip, that is plain guidance with a scale for each of the table's calls, which this computes.

        Args:
            table: of a first-order solver such as ``ddim``, without a clip, whole.
            guidance_scale: lambda, 0 to 1, of which 0.6 is about a plain scale of 7.5.

        >>> from fastguide import NoiseSchedule, ddim
        >>> ClassifierFree.plus_plus(ddim(NoiseSchedule.linear(), 50), 0.6).steps
        50
        """
        scale = as_scale("guidance_scale", guidance_scale)
        if not isinstance(scale, float):
            raise TypeError(f"guidance_scale: expected a number for CFG++, got {type(guidance_scale).__name__}")
        return cls.per_step(plus_plus_scales(table, scale))

    @classmethod
    def per_step(cls, guidance_scale: Sequence[float] | Tensor, *, guidance_rescale: Scale = 0.0) -> ClassifierFree:
        """Return guidance with one scale per step, shape ``(steps,)``, the same for every sample."""
        return cls(as_scale_per_step("guidance_scale", guidance_scale), guidance_rescale=guidance_rescale)
