"""Random inputs of a guided step, and the textbook's answer to them in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastguide
from fastguide.step.memory import empty_like
from tests.support.cases import alphas
from tests.support.textbook import clipped, ddim_step, ddpm_step, guided_prediction, original_and_epsilon

SETTINGS = {  # how tables of cases.TABLES were made, for the textbook
    "ddim": {},
    "ddim clipped": {"clip": 1.0, "prediction_type": "v_prediction"},
    "ddim noisy": {"clip": 1.0, "eta": 1.0, "use_clipped": True},
    "ddpm": {"clip": 1.0},
    "ddpm learned": {"variance_type": "learned_range"},
}
GUIDANCE_SCALE = 7.5
GRADIENT_SCALE = 1.3


@dataclass
class StepInputs:
    sample: Tensor
    predictions: list[Tensor]
    gradient: Tensor | None
    variance: Tensor | None
    noise: Tensor | None

    def map(self, function) -> StepInputs:
        """The same with ``function`` applied to each tensor."""
        return replace(
            self,
            sample=function(self.sample),
            predictions=[function(p) for p in self.predictions],
            **{
                name: None if getattr(self, name) is None else function(getattr(self, name))
                for name in ("gradient", "variance", "noise")
            },
        )


def make_inputs(table, shape, generator, *, count=2, gradient=False, dtype=torch.float32, sample_dtype=None):
    """Predictions of ``count`` conditions nearly agree, as a model's do."""

    def draw(scale=1.0, of=dtype):
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(of)

    base = draw(of=torch.float64)
    return StepInputs(
        sample=draw(of=sample_dtype or dtype),
        predictions=[(base + draw(0.1, torch.float64)).to(dtype) for _ in range(count)],
        gradient=draw() if gradient else None,
        variance=draw(0.5).clamp(-1, 1) if table.learned_variance else None,
        noise=draw() if table.adds_noise_anywhere else None,
    )


def make_guidance(count: int, form: str | None) -> fastguide.Guidance | None:
    if count == 1:
        guidance = None
    elif count == 2:
        guidance = fastguide.ClassifierFree(GUIDANCE_SCALE)
    else:
        guidance = fastguide.Composed([GUIDANCE_SCALE / k for k in range(1, count)])
    if form is None:
        return guidance
    classifier = fastguide.Classifier(None, GRADIENT_SCALE, form)
    return classifier if guidance is None else guidance + classifier


def textbook(name, table, step, inputs, form, dtype) -> tuple[Tensor, Tensor]:
    """Next sample and predicted original sample by the textbook, with every operation in ``dtype``."""
    i = inputs.map(lambda t: t.to(dtype))
    a, a_prev = alphas(table, step)
    scales = [GUIDANCE_SCALE / k for k in range(1, len(i.predictions))]
    m = guided_prediction(i.predictions, scales)
    settings = dict(SETTINGS[name])
    sg = None if i.gradient is None else GRADIENT_SCALE * i.gradient
    if name.startswith("ddpm"):
        last = step == len(table) - 1
        result = ddpm_step(i.sample, m, a, a_prev, last=last, form=form, sg=sg, v=i.variance, z=i.noise, **settings)
    else:
        result = ddim_step(i.sample, m, a, a_prev, form=form, sg=sg, z=i.noise, **settings)
    prediction_type = settings.get("prediction_type", "epsilon")
    if form == "epsilon":
        if prediction_type == "epsilon":
            m = m - (1 - a) ** 0.5 * sg
        else:
            assert prediction_type == "v_prediction"
            m = m - (1 - a) ** 0.5 / a**0.5 * sg
    x0, _ = original_and_epsilon(prediction_type, i.sample, m, a)
    return result, clipped(x0, settings.get("clip"))


def guided_step(table, index, sample, *arguments, return_original=False, **options):
    """``fastguide.guided_step``; with ``return_original``, what it writes to a new ``original=`` as well."""
    if not return_original:
        return fastguide.guided_step(table, index, sample, *arguments, **options)
    out = options.get("out")
    original = empty_like(sample if out is None else out)
    return fastguide.guided_step(table, index, sample, *arguments, original=original, **options), original


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Root mean square and largest absolute error; NaN counts as infinite."""
    difference = (got.double() - truth).abs().nan_to_num(torch.inf)
    return (difference.square().mean().sqrt().item(), difference.max().item()) if difference.numel() else (0.0, 0.0)
