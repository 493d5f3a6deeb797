"""Classifier-free guidance: the conditional prediction is amplified against the unconditional one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .weights import Guidance, Scale, as_scale, as_scale_per_step, scale_columns


class ClassifierFree(Guidance):
    """Combine two predictions: ``m = uncond + guidance_scale * (cond - uncond)`` (Ho & Salimans 2022, eq. 6).

    Predictions come in the order unconditional, conditional; for a negative prompt, its prediction takes the place
    of the unconditional one. Scale 0 is unconditional, 1 conditional, more amplifies, less than 0 leads away.

    Args:
        guidance_scale: a number; or one per sample, a sequence or tensor of shape ``(batch,)``; or one per step, a
            tensor of shape ``(steps, 1)``, or ``(steps, batch)`` for both; for a sliced table, those of its steps. A
            guidance interval is a column of scales that are 1 (or 0) outside of it. A tensor may live on the device;
            its values are then not checked, as that would wait for the device.

    >>> ClassifierFree(7.5), ClassifierFree([3.0, 7.5]).batch, ClassifierFree.per_step([1.0, 7.5, 1.0]).steps
    (ClassifierFree(2 predictions), 2, 3)
    """

    def __init__(self, guidance_scale: Scale) -> None:
        super().__init__(scale_columns(1.0, as_scale("guidance_scale", guidance_scale), 0.0), None)

    @classmethod
    def from_w(cls, w: Scale) -> ClassifierFree:
        """Return the paper's own form, ``(1 + w) * cond - w * uncond``, which is ``guidance_scale = 1 + w``."""
        return cls(as_scale("w", w) + 1)

    @classmethod
    def per_step(cls, guidance_scale: Sequence[float] | Tensor) -> ClassifierFree:
        """Return guidance with one scale per step, shape ``(steps,)``, the same for every sample."""
        return cls(as_scale_per_step("guidance_scale", guidance_scale))
