"""Fuse the guidance of diffusers' modular pipelines, by a guider, into the scheduler's step.

Each class is diffusers' of the same name: the same configuration, state and interface. Most trace the predictions, and
let diffusers' own code combine them: sums, and what is made of their norms and deviations, wait for the step. What that
code does by other means, or wrongly, is a guidance of fastguide's whose weights the step makes. Anything else that asks
for a result computes it as diffusers does.
"""

from __future__ import annotations

import importlib.util
import math
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

from ..guidance import FrequencyDecoupled, Guidance, MagnitudeAware, Tangential
from ..guidance.formulas import Base
from ..solvers import StepTable
from ..step.guided_step import guided_step
from ..step.memory import in_layout_of
from .guided import Guided, may_be_traced, may_wait
from .known import unknown
from .lazy_tensor import plain
from .saved_as import SavedAsDiffusers
from .traced import Fusion, Waiting, traced

_ONE = torch.ones(1, dtype=torch.float64, device="cpu")
_PREDICTION = StepTable.from_columns(
    torch.zeros(1, dtype=torch.int64, device="cpu"), {"out_pred": _ONE}, name="the guided prediction"
)
_MOST = 64
_made: weakref.WeakKeyDictionary[Any, dict[Any, Guidance]] = weakref.WeakKeyDictionary()
"""By guider, what was made of its numbers: a guidance has memory that two pipelines must not share."""


def _kept(guider: Any, make: Callable[..., Guidance], scale: Any, **options: Any) -> Guidance:
    """Return a guider's guidance, the same one for the same numbers: steps with it are then repeated."""
    made = _made.setdefault(guider, {})
    key = make, scale, tuple(options.items())
    guidance = made.get(key)
    if guidance is None:
        if len(made) >= _MOST:
            made.clear()
        guidance = made[key] = make(scale, **options)
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
    guidance = _kept(guider, make, guider.guidance_scale, **options, guidance_rescale=guider.guidance_rescale)
    result = Guided((pred_uncond, pred_cond), guidance, lambda: forward(pred_cond, pred_uncond)[0])
    return _output(result, pred_cond, pred_uncond)


def _output(pred: Any, pred_cond: Tensor, pred_uncond: Tensor | None) -> Any:
    """Return what ``forward`` does; before diffusers 0.36, that was a tuple."""
    kind: Any = getattr(_utils, "GuiderOutput", None)
    return (pred, {}) if kind is None else kind(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


_fusions: weakref.WeakKeyDictionary[Any, Fusion] = weakref.WeakKeyDictionary()
"""By guider, what keeps the weights that were made: two pipelines must not share their memory."""


class _Traces:
    """Mix this into a guider, whose own code then combines traced predictions."""

    def forward(self, *predictions: Tensor | None, **named: Tensor | None) -> Any:
        """Combine the predictions as diffusers does, in the step that uses the result."""
        fusion = _fusions.setdefault(self, Fusion())
        fusion.steps += 1
        given = [_traced(prediction, fusion) for prediction in predictions]
        output = super().forward(  # type: ignore[misc]
            *given, **{name: _traced(prediction, fusion) for name, prediction in named.items()}
        )
        buffer = getattr(self, "momentum_buffer", None)
        if buffer is not None:
            average = unknown(buffer.running_average)
            if isinstance(average, Waiting):  # of outputs that may be overwritten
                buffer.running_average = average.value()
        return output


def _traced(prediction: Any, fusion: Fusion) -> Any:
    return traced(prediction, fusion) if may_be_traced(prediction) else prediction


class ClassifierFreeGuidance(_Traces, _classifier_free.ClassifierFreeGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.ClassifierFreeGuidance``, whose result is computed in the step of one of fastguide's schedulers."""


class ClassifierFreeZeroStarGuidance(
    _Traces, _zero_star.ClassifierFreeZeroStarGuidance, metaclass=SavedAsDiffusers
):  # fmt: skip
    """``diffusers.ClassifierFreeZeroStarGuidance``, whose result is computed in the step.

    Its first steps are 0 with rescaling too, where diffusers divides 0 by 0, and returns NaN.
    """

    def forward(  # type: ignore[override]  # of which the mixed-in one takes any number
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None
    ) -> Any:
        """Combine the predictions as diffusers does, in the step that uses the result."""
        if self._enabled and self._step < self.zero_init_steps:
            return _output(torch.zeros_like(plain(pred_cond)), pred_cond, pred_uncond)
        return super().forward(pred_cond, pred_uncond)


class AdaptiveProjectedGuidance(_Traces, _projected.AdaptiveProjectedGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.AdaptiveProjectedGuidance``, whose result is computed in the step.

    Momentum is added up by diffusers' own operations, and is one term more. With norms over some dimensions alone,
    diffusers computes the result.
    """


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


class PerturbedAttentionGuidance(_Traces, _perturbed.PerturbedAttentionGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.PerturbedAttentionGuidance``, whose result is computed in the step."""


class SkipLayerGuidance(_Traces, _skipped.SkipLayerGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.SkipLayerGuidance``, whose result is computed in the step."""


class SmoothedEnergyGuidance(_Traces, _smoothed.SmoothedEnergyGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.SmoothedEnergyGuidance``, whose result is computed in the step.

    It counts its model's calls, as diffusers' other guiders do: diffusers' own does not, and so blurs no attention.
    """

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Blur the attention for the call that is the third, or the second without classifier-free guidance."""
        self._count_prepared += 1
        super().prepare_models(denoiser)


class AutoGuidance(_Traces, _auto.AutoGuidance, metaclass=SavedAsDiffusers):
    """``diffusers.AutoGuidance``, whose result is computed in the step."""


def _has(module: str) -> bool:
    """Tell whether this version of diffusers has a guider."""
    return importlib.util.find_spec(f"diffusers.guiders.{module}") is not None


if _has("adaptive_projected_guidance_mix"):
    import diffusers.guiders.adaptive_projected_guidance_mix as _mix

    class AdaptiveProjectedMixGuidance(_Traces, _mix.AdaptiveProjectedMixGuidance, metaclass=SavedAsDiffusers):
        """``diffusers.AdaptiveProjectedMixGuidance``, whose result is computed in the step.

        Momentum is added up by diffusers' own operations, and is one term more.
        """


if _has("frequency_decoupled_guidance"):
    import diffusers.guiders.frequency_decoupled_guidance as _decoupled

    class FrequencyDecoupledGuidance(_decoupled.FrequencyDecoupledGuidance, metaclass=SavedAsDiffusers):
        """``diffusers.FrequencyDecoupledGuidance``, whose result is computed in the step, of one pyramid.

        A level that is left out has the conditional prediction's frequencies, where diffusers' own raises an error, or
        takes those of the level before; and results have the predictions' size, also where it is no power of two. With
        weights for what is parallel, or rescaling of each level, diffusers computes the result.
        """

        def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
            """Combine the predictions as diffusers does, in the step that uses the result."""
            by_level = self.guidance_rescale_space == "freq" and any(rescale > 0 for rescale in self.guidance_rescale)
            ours = self.levels > 1 and all(math.isclose(weight, 1.0) for weight in self.parallel_weights)
            if not self._is_fdg_enabled() or by_level or not ours:
                return super().forward(pred_cond, pred_uncond)
            if pred_uncond is None or not (may_wait(pred_cond) and may_wait(pred_uncond)):
                return super().forward(pred_cond, pred_uncond)
            none = 0.0 if self.use_original_formulation else 1.0
            scales = [
                scale if self._is_fdg_enabled_for_level(level) else none
                for level, scale in enumerate(self.guidance_scales)
            ]
            rescale = 0.0 if self.guidance_rescale_space == "freq" else self.guidance_rescale[0]
            guidance = _kept(self, FrequencyDecoupled, tuple(scales), guidance_rescale=rescale, base=_base(self))
            terms = tuple(guidance.terms([pred_uncond, pred_cond]))
            return _output(Guided(terms, guidance, lambda: _weighed(guidance, terms)), pred_cond, pred_uncond)


def _weighed(guidance: Guidance, terms: tuple[Tensor, ...]) -> Tensor:
    """Return the sum that a guidance makes of its terms, by a step that does nothing else, in the first's dtype."""
    sample = torch.zeros_like(terms[0], dtype=terms[-1].dtype)
    table = _PREDICTION.to(sample.device)
    return guided_step(table, 0, sample, [in_layout_of(sample, term) for term in terms], guidance).to(terms[0].dtype)


if _has("ltx2_guidance"):
    import diffusers.guiders.ltx2_guidance as _ltx2

    class LTX2Guidance(_Traces, _ltx2.LTX2Guidance, metaclass=SavedAsDiffusers):
        """``diffusers.LTX2Guidance``, whose result is computed in the step, with up to four predictions.

        The conversion back from x_0, a sum with the sample, is as well.
        """


if _has("magnitude_aware_guidance"):
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
