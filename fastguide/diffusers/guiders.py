"""Fuse the guidance of diffusers' modular pipelines, by a guider, into the scheduler's step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import classifier_free_guidance as _diffusers
from torch import Tensor

from .saved_as import SavedAsDiffusers
from .traced import traced


class ClassifierFreeGuidance(_diffusers.ClassifierFreeGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.ClassifierFreeGuidance``, whose result is computed in the step of one of fastguide's schedulers.

    It has the same configuration and interface. Anything else that uses the result, such as rescaled guidance, makes
    diffusers' own computation of it.
    """

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, but trace them first."""
        if pred_uncond is not None and _traceable(pred_uncond) and _traceable(pred_cond):
            pred_uncond, pred_cond = traced(pred_uncond, None), traced(pred_cond, None)  # type: ignore[assignment]
        return super().forward(pred_cond, pred_uncond)


def _traceable(tensor: Any) -> bool:
    if type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and tensor.requires_grad)
