"""Guiders for diffusers' modular pipelines whose guidance is fused into the scheduler's step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import classifier_free_guidance as _diffusers
from torch import Tensor

from .lazy_guidance import Pair, Traced


class ClassifierFreeGuidance(_diffusers.ClassifierFreeGuidance):
    """``diffusers.ClassifierFreeGuidance``, whose result is computed in the step of a scheduler of fastguide's.

    The same configuration and interface. Given to anything else than such a step, the result is computed there, and is
    diffusers' own: rescaled guidance is, for one.
    """

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """As diffusers', of predictions that are traced."""
        apart = [] if pred_uncond is None else [pred_uncond, pred_cond]
        if len(apart) == 2 and all(_traceable(tensor) for tensor in apart):
            pred_uncond, pred_cond = Traced.both(Pair(*apart))
        return super().forward(pred_cond, pred_uncond)


def _traceable(tensor: Any) -> bool:
    if type(tensor) is not Tensor or tensor.is_inference() or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and tensor.requires_grad)
