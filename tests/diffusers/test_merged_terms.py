"""Terms that always occur together, latents included, are added first where a formula has more than kernels take.

Where torch does not count who writes to the latents, in inference mode, each x_0 that is made of them has its own copy.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import guider_utils

import fastguide
from fastguide.diffusers import traced as module
from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.lazy_guidance import Taken, resolved
from fastguide.diffusers.scheduler_step import counted_as
from fastguide.diffusers.traced import Fusion

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
SHAPE = (2, 24, 16)


def velocity(latents, predictions, sigma, copy, scales=(3.0, 1.0, 2.0)):
    """Guide in x_0, rescale, and convert back, as LTX-2 does; each sum takes the latents as ``copy`` returns them."""
    cond, *others = [copy(latents) - prediction * sigma for prediction in predictions]
    guided = cond
    for scale, other in zip(scales, others, strict=False):
        guided = guided + scale * (cond - other)
    return (copy(latents) - guider_utils.rescale_noise_cfg(guided, cond, 0.7)) / sigma


def inputs(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    latents, first = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    predictions = [first + 0.3 * torch.randn(SHAPE, generator=generator) for _ in range(count)]
    return latents, [each.to(dtype) for each in predictions]


def traced(predictions):
    fusion = Fusion()
    fusion.begin()
    return fusion, [module.traced(each, fusion) for each in predictions]


def weighed(output, dtype=torch.float64):
    """Return what a step makes of its predictions, how many they are, and what it is counted as."""
    taken, scale = resolved(output, torch.zeros(SHAPE), None)
    assert type(taken) is Taken
    guidance = guidance_of(taken, torch.zeros(SHAPE), scale, None, 1.0, "epsilon")
    predictions = [each.to(dtype) for each in taken.predictions]
    made = guided_step(predictions, guidance)
    return made, len(predictions), counted_as(guidance)


def guided_step(predictions, guidance):
    return fastguide.guided_step(PREDICTION, 0, torch.zeros_like(predictions[0]), predictions, guidance)


def error(got, exact):
    """Return the root of the mean square, which varies less than the largest one."""
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


SIGMAS = {
    "a number": lambda sigma: sigma,
    "on the host": torch.tensor,
    "one a sample": lambda sigma: torch.tensor([sigma, 0.9 * sigma]).view(2, 1, 1),
}


@pytest.mark.parametrize("copies", ["one each", "the same"])
@pytest.mark.parametrize("sigma", [1.0, 0.9995, 0.05])
@pytest.mark.parametrize("kind", SIGMAS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_guidance_in_x0_is_left_to_the_step(count, kind, sigma, copies):
    copy = torch.clone if copies == "one each" else lambda latents: latents
    latents, predictions = inputs(count)
    sigma = SIGMAS[kind](sigma)
    own = velocity(latents, predictions, sigma, copy)
    exact = velocity(latents.double(), [each.double() for each in predictions], sigma, copy)
    fusion, given = traced(predictions)
    got, terms, counted = weighed(velocity(latents, given, sigma, copy))
    assert terms <= 4
    assert counted == "fused with guidance"
    assert not fusion.computed
    assert error(got, exact) <= 1.4 * error(own, exact)
    in_float32 = weighed(velocity(latents, traced(predictions)[1], sigma, copy), torch.float32)[0]
    assert error(in_float32, exact) <= 1.6 * error(own, exact)


@pytest.mark.parametrize("copy", [torch.clone, lambda latents: latents])
def test_scales_that_cancel_leave_no_mean(copy):
    latents, predictions = inputs(4)
    scales = 3.0, 1.0, -4.0
    own = velocity(latents, predictions, 0.4, copy, scales)
    exact = velocity(latents.double(), [each.double() for each in predictions], 0.4, copy, scales)
    got, *_ = weighed(velocity(latents, traced(predictions)[1], 0.4, copy, scales), torch.float32)
    assert error(got, exact) <= 1.6 * error(own, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["a number", "on the host"])
def test_predictions_in_16_bits_are_added_in_float32(kind, dtype):
    """As the latents are, so that the pipeline's own sums are in float32 as well."""
    latents, predictions = inputs(4, dtype)
    sigma = SIGMAS[kind](0.4)
    given = velocity(latents, traced(predictions)[1], sigma, torch.clone)
    predictions = [each.double() for each in predictions]
    exact = velocity(latents.double(), predictions, sigma, torch.clone)
    got, *_ = weighed(given)
    assert error(got, exact) <= 3e-6


@pytest.mark.parametrize("written", [False, True])
def test_in_inference_mode_latents_that_stay_the_same_are_copied_once(written):
    def clone_of(latents):
        if written:
            latents.mul_(0.9)
        return latents

    with torch.inference_mode():
        latents, predictions = inputs(2)
        exact = velocity(latents.double(), [each.double() for each in predictions], 0.4, clone_of)
        fusion, given = traced(predictions)
        made = velocity(latents, given, 0.4, clone_of)
        assert len(fusion.copies) == (3 if written else 1)
        latents.zero_()
        got, terms, _ = weighed(made)
        assert terms == 3
        fusion.steps += 1
        made = module.traced(predictions[0], fusion) + latents
        assert len(fusion.copies) == 1
        torch.testing.assert_close(weighed(made)[0].float(), predictions[0])
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_terms_that_do_not_occur_together_are_computed():
    """Of five predictions, each in another proportion to the rescaled and to the guided one."""
    latents, predictions = inputs(5)

    def expression(predictions):
        first, *others = predictions
        total = sum((number + 2.0) * each for number, each in enumerate(others))
        return guider_utils.rescale_noise_cfg(first + total, sum(predictions), 0.7)

    fusion, given = traced(predictions)
    got, _ = resolved(expression(given), latents, None)
    assert torch.equal(got, expression(predictions))
    assert list(fusion.computed) == ["the step, which does not take it apart"]


def test_terms_of_several_scales_are_computed():
    latents, predictions = inputs(2)
    first, second = (SIGMAS["one a sample"](sigma) for sigma in (0.4, 0.3))

    def expression(predictions):
        cond, uncond = predictions
        cond, uncond = latents.clone() - cond * first, latents.clone() - uncond * second
        return guider_utils.rescale_noise_cfg(cond, uncond, 0.7) + 3.0 * (latents.clone() - cond)

    got, _ = resolved(expression(traced(predictions)[1]), latents, None)
    assert torch.equal(got, expression(predictions))
