"""Fuse the guidance of diffusers' modular pipelines, by a guider, into the scheduler's step.

Each class is diffusers' of the same name: the same configuration, state and interface. What is linear in the
predictions is traced; what is made of their norms and deviations is a guidance whose weights the step makes. Anything
else that asks for a result computes it as diffusers does.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import diffusers.guiders.adaptive_projected_guidance as _projected
import diffusers.guiders.auto_guidance as _auto
import diffusers.guiders.classifier_free_guidance as _classifier_free
import diffusers.guiders.classifier_free_zero_star_guidance as _zero_star
import diffusers.guiders.guider_utils as _utils
import diffusers.guiders.perturbed_attention_guidance as _perturbed
import diffusers.guiders.skip_layer_guidance as _skipped
import diffusers.guiders.smoothed_energy_guidance as _smoothed
import diffusers.guiders.tangential_classifier_free_guidance as _tangential
import torch
from torch import Tensor

from ..guidance import AdaptiveProjected, ClassifierFree, Guidance, MagnitudeAware, Tangential, ZeroStar
from ..guidance.formulas import Base
from .guided import Guided, may_be_traced, may_wait
from .saved_as import SavedAsDiffusers
from .traced import traced

_MOST = 64
_made: weakref.WeakKeyDictionary[Any, dict[Any, Guidance]] = weakref.WeakKeyDictionary()
"""By guider, what was made of its numbers: a guidance has memory that two pipelines must not share."""


def _guidance_of(guider: Any, make: Callable[..., Guidance], **options: Any) -> Guidance:
    """Return a guider's guidance, the same one for the same numbers: steps with it are then repeated."""
    made = _made.setdefault(guider, {})
    options |= {"guidance_rescale": guider.guidance_rescale}
    key = make, guider.guidance_scale, tuple(options.items())
    guidance = made.get(key)
    if guidance is None:
        if len(made) >= _MOST:
            made.clear()
        guidance = made[key] = make(guider.guidance_scale, **options)
    return guidance


def _base(guider: Any) -> Base:
    return "cond" if guider.use_original_formulation else "uncond"


def _left_to_the_step(
    guider: Any, forward: Callable[..., Any], pred_cond: Tensor, pred_uncond: Tensor | None, make: Any, **options: Any
) -> Any:
    """Return a guider's output, whose result waits for the step if it can.

    Args:
        guider: whose scale and rescaling it is.
        forward: diffusers' own.
        pred_cond, pred_uncond: the model's outputs; without the second, guidance is off.
        make: the guidance's class, of a scale and the options.
    """
    if pred_uncond is None or not (may_wait(pred_cond) and may_wait(pred_uncond)):
        return forward(pred_cond, pred_uncond)
    guidance = _guidance_of(guider, make, **options)
    result = Guided((pred_uncond, pred_cond), guidance, lambda: forward(pred_cond, pred_uncond)[0])
    return _output(result, pred_cond, pred_uncond)


def _output(pred: Any, pred_cond: Tensor, pred_uncond: Tensor | None) -> Any:
    """Return what ``forward`` does; before diffusers 0.36, that was a tuple."""
    kind: Any = getattr(_utils, "GuiderOutput", None)
    return (pred, {}) if kind is None else kind(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def _traced(prediction: Any) -> Any:
    return traced(prediction, None) if may_be_traced(prediction) else prediction


class ClassifierFreeGuidance(_classifier_free.ClassifierFreeGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.ClassifierFreeGuidance``, whose result is computed in the step of one of fastguide's schedulers."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, in the step that uses the result."""
        if pred_uncond is None or not self._is_cfg_enabled():
            return super().forward(pred_cond, pred_uncond)
        if self.guidance_rescale > 0.0:
            make = ClassifierFree.from_w if self.use_original_formulation else ClassifierFree
            return _left_to_the_step(self, super().forward, pred_cond, pred_uncond, make)
        return super().forward(_traced(pred_cond), _traced(pred_uncond))


class ClassifierFreeZeroStarGuidance(_zero_star.ClassifierFreeZeroStarGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.ClassifierFreeZeroStarGuidance``, whose result is computed in the step.

    Its first steps are 0 with rescaling too, where diffusers divides 0 by 0, and returns NaN.
    """

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, in the step that uses the result."""
        if self._enabled and self._step < self.zero_init_steps:
            return _output(torch.zeros_like(pred_cond), pred_cond, pred_uncond)
        if not self._is_cfg_enabled():
            return super().forward(pred_cond, pred_uncond)
        return _left_to_the_step(
            self, super().forward, pred_cond, pred_uncond, ZeroStar, base=_base(self), zero_init_steps=0
        )


class AdaptiveProjectedGuidance(_projected.AdaptiveProjectedGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.AdaptiveProjectedGuidance``, whose result is computed in the step.

    With momentum, or norms over some dimensions alone, diffusers computes it.
    """

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, in the step that uses the result."""
        dims = getattr(self, "adaptive_projected_guidance_norm_dim", None)
        if not self._is_apg_enabled() or self.momentum_buffer is not None or dims is not None:
            return super().forward(pred_cond, pred_uncond)
        longest = self.adaptive_projected_guidance_rescale
        return _left_to_the_step(
            self, super().forward, pred_cond, pred_uncond, AdaptiveProjected,
            eta=self.eta, norm_threshold=longest if longest > 0 else None, base=_base(self),
        )  # fmt: skip


class TangentialClassifierFreeGuidance(_tangential.TangentialClassifierFreeGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.TangentialClassifierFreeGuidance``, whose result is computed in the step, without a decomposition."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, in the step that uses the result."""
        if not self._is_tcfg_enabled():
            return super().forward(pred_cond, pred_uncond)
        return _left_to_the_step(self, super().forward, pred_cond, pred_uncond, Tangential, base=_base(self))

    @property
    def is_conditional(self) -> bool:
        """Whether the batch that was prepared last is the conditional one; diffusers' own raises an AttributeError."""
        return bool(self._count_prepared == 1)


class PerturbedAttentionGuidance(_perturbed.PerturbedAttentionGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.PerturbedAttentionGuidance``, whose result is computed in the step, but for rescaling."""

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> Any:
        """Combine the predictions as diffusers does, but trace them first."""
        return super().forward(_traced(pred_cond), _traced(pred_uncond), _traced(pred_cond_skip))


class SkipLayerGuidance(_skipped.SkipLayerGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.SkipLayerGuidance``, whose result is computed in the step, but for rescaling."""

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> Any:
        """Combine the predictions as diffusers does, but trace them first."""
        return super().forward(_traced(pred_cond), _traced(pred_uncond), _traced(pred_cond_skip))


class SmoothedEnergyGuidance(_smoothed.SmoothedEnergyGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.SmoothedEnergyGuidance``, whose result is computed in the step, but for rescaling.

    It counts its model's calls, as diffusers' other guiders do: diffusers' own does not, and so blurs no attention.
    """

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Blur the attention for the call that is the third, or the second without classifier-free guidance."""
        self._count_prepared += 1
        super().prepare_models(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_seg: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, but trace them first."""
        return super().forward(_traced(pred_cond), _traced(pred_uncond), _traced(pred_cond_seg))


class AutoGuidance(_auto.AutoGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.AutoGuidance``, whose result is computed in the step, but for rescaling."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Combine the predictions as diffusers does, but trace them first."""
        return super().forward(_traced(pred_cond), _traced(pred_uncond))


if importlib.util.find_spec("diffusers.guiders.magnitude_aware_guidance") is not None:  # of newer versions
    import diffusers.guiders.magnitude_aware_guidance as _magnitude

    class MagnitudeAwareGuidance(_magnitude.MagnitudeAwareGuidance, metaclass=SavedAsDiffusers):
        """``diffusers.MagnitudeAwareGuidance``, whose result is computed in the step.

        It takes images and videos too, where diffusers' own raises an error.
        """

        def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
            """Combine the predictions as diffusers does, in the step that uses the result."""
            if pred_uncond is None or not self._is_mambo_g_enabled():
                return super().forward(pred_cond, pred_uncond)

            def forward(cond: Tensor, uncond: Tensor) -> Any:
                made = super(MagnitudeAwareGuidance, self).forward(cond.flatten(1)[:, None], uncond.flatten(1)[:, None])
                return _output(made[0].view_as(cond), cond, uncond)

            return _left_to_the_step(
                self, forward, pred_cond, pred_uncond, MagnitudeAware, alpha=self.alpha, base=_base(self)
            )
