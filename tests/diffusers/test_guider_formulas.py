"""Guidance from moments beside diffusers' guiders of the same name, with the scales that mean the same."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree, Guidance, MagnitudeAware, Perturbed, Tangential, ZeroStar
from tests.support.scheduler_pair import diffusers

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
SHAPE = (2, 16, 24)  # packed, as diffusers' magnitude-aware guider takes no other

GUIDERS = {  # ours, diffusers' class and options, and how far they may be from each other
    "plain": (lambda **how: ClassifierFree(7.5, **how), "ClassifierFreeGuidance", {"guidance_scale": 7.5}, 1e-12),
    "zero star": (  # diffusers' factor is float32
        lambda **how: ZeroStar(7.5, zero_init_steps=0, **how),
        "ClassifierFreeZeroStarGuidance", {"guidance_scale": 7.5, "zero_init_steps": 0}, 1e-6,
    ),
    "projected": (
        lambda **how: AdaptiveProjected(7.5, eta=0.3, norm_threshold=4.0, **how),
        "AdaptiveProjectedGuidance",
        {"guidance_scale": 7.5, "eta": 0.3, "adaptive_projected_guidance_rescale": 4.0}, 1e-12,
    ),
    "projected of cond": (
        lambda **how: AdaptiveProjected(7.5, base="cond", **how),
        "AdaptiveProjectedGuidance",
        {"guidance_scale": 7.5, "eta": 0.0, "use_original_formulation": True}, 1e-12,
    ),
    "tangential": (  # diffusers' decomposition is in float32
        lambda **how: Tangential(7.5, **how), "TangentialClassifierFreeGuidance", {"guidance_scale": 7.5}, 1e-4,
    ),
    "magnitude": (lambda **how: MagnitudeAware(10.0, **how), "MagnitudeAwareGuidance", {"guidance_scale": 10.0}, 1e-12),
    "perturbed": (
        lambda **how: Perturbed(7.5, 2.0, **how), "PerturbedAttentionGuidance",
        {"guidance_scale": 7.5, "perturbed_guidance_scale": 2.0, "perturbed_guidance_layers": [0],
         "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}, 1e-12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("name", GUIDERS)
def test_the_weights_are_the_guider_s(name, rescale):
    make, kind, config, tolerance = GUIDERS[name]
    if not hasattr(diffusers.guiders, kind):
        pytest.skip(f"this diffusers has no {kind}")
    guidance: Guidance = make(guidance_rescale=rescale)
    guider = getattr(diffusers.guiders, kind)(**config, guidance_rescale=rescale, start=0.0, stop=1.0)
    guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))
    generator = torch.Generator().manual_seed(3)
    uncond = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    cond, weak = (uncond + 0.3 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    given = [uncond, cond, weak][: guidance.num_predictions]
    expected = guider.forward(cond, uncond, *given[2:]).pred
    got = fastguide.guided_step(PREDICTION, 0, torch.zeros_like(uncond), given, guidance)
    assert (got - expected).norm() <= tolerance * expected.norm()
