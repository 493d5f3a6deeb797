"""Sums of outputs and of a pipeline's own tensors, as pipelines convert predictions: what the step takes of them."""

from __future__ import annotations

import pytest
import torch

from fastguide import StepTable, guided_step
from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.taken import Taken
from fastguide.diffusers.traced import Combined, Fusion
from fastguide.diffusers.traced import traced as traced_for
from tests.support.pipelines import FreeModel
from tests.support.scheduler_pair import diffusers, fused, randn

SHAPE, SCALE = (2, 3, 5), 4.0
PREDICTION = StepTable.from_columns(
    torch.zeros(1), {"out_pred": torch.ones(1, dtype=torch.float64)}, name="a prediction"
)
X, UNCOND, COND = randn(3, *SHAPE)


def sigmas():
    return torch.tensor([0.7, 0.3])


def fusion_of():
    fusion = Fusion()
    fusion.tries = True
    return fusion


def two_calls(fusion=None):
    """Return the outputs of two calls of a model."""
    fusion = fusion_of() if fusion is None else fusion
    return traced_for(UNCOND.clone(), fusion), traced_for(COND.clone(), fusion)


def x0_and_back(x, u, c, sigma):
    """Guide in x_0, as LTX-2's pipelines do, which ask for sigma each time."""
    x0, x0_uncond = x - c * sigma[0], x - u * sigma[0]
    return (x - (x0 + (SCALE - 1) * (x0 - x0_uncond) + 0)) / sigma[0]


def x0_and_back_by_samples(x, u, c, sigma):
    """Guide in x_0, each sample by its own sigma, which is gone in the end."""
    return x0_and_back(x, u, c, [sigma.view(2, 1, 1)])


def without_guidance(x, u, c, sigma):
    return (x - (x - c * sigma[0])) / sigma[0]


def velocity_of_x0(x, u, c, sigma):
    """Make a velocity of x_0, as PRX' pipeline for pixels does."""
    return (x - (u + SCALE * (c - u))) / sigma[1]


def velocity_of_x0_in_halves(x, u, c, sigma):
    u, c = traced_or_cat(u, c).chunk(2)
    return velocity_of_x0(x, u, c, sigma)


def preconditioned(x, u, c, sigma):
    """Add a multiple of the model's input, as the latent upscaler of Stable Diffusion does."""
    both = 0.4 * torch.cat([x, x]) + sigma[0] * traced_or_cat(u, c)
    u, c = both.chunk(2)
    return u + SCALE * (c - u)


def traced_or_cat(u, c):
    if type(u) is torch.Tensor:
        return torch.cat([u, c])
    return traced_for(torch.cat([u.value(), c.value()]), u.source.fusion)


EXPRESSIONS = {  # and how many tensors the step weighs
    "x_0 and back": (x0_and_back, 2),
    "x_0 and back, by samples": (x0_and_back_by_samples, 2),
    "x_0 and back, alone": (without_guidance, 1),
    "a velocity": (velocity_of_x0, 3),
    "a velocity, of halves": (velocity_of_x0_in_halves, 3),
    "preconditioned": (preconditioned, 4),
    "added": (lambda x, u, c, sigma: c + SCALE * (c - u) + x, 3),
    "added first": (lambda x, u, c, sigma: x + (c + SCALE * (c - u)), 3),
    "taken away": (lambda x, u, c, sigma: c + SCALE * (c - u) - x, 3),
    "added twice": (lambda x, u, c, sigma: (u + x) + SCALE * ((c + x) - (u + x)), 3),
    "divided, multiplied": (lambda x, u, c, sigma: sigma[0] * ((c - u) / sigma[0]) + u, 2),
    "two sigmas": (lambda x, u, c, sigma: (x - c * sigma[0]) / sigma[1], 2),
    "a sigma of what was added": (lambda x, u, c, sigma: (x - c * sigma[0]) / sigma[0], 2),
    "one sigma by another": (lambda x, u, c, sigma: c * sigma[0] / sigma[1], 1),
    "a sigma, twice": (lambda x, u, c, sigma: c * sigma[0] * sigma[0], 1),
    "another dtype": (lambda x, u, c, sigma: x.double() - c, 2),
    "a sigma of each sample": (lambda x, u, c, sigma: (u + SCALE * (c - u) - x) / sigma.view(2, 1, 1), 3),
    "nothing added": (lambda x, u, c, sigma: 0 + (u + SCALE * (c - u) + 0.0) - 0, 2),
}


def weighed(output):
    """Return what a step makes of its predictions, in float64, and how many they are."""
    taken, scale = resolved(output, X, None)
    if type(taken) is torch.Tensor:
        taken = Taken(taken.chunk(len(taken) // len(X)), None, taken.dtype)
    if scale is None:
        return taken.predictions[0].double(), 1
    guidance = guidance_of(taken, X, scale, None, 1.0, "epsilon")
    predictions = [each.double() for each in taken.predictions]
    return guided_step(PREDICTION, 0, torch.zeros_like(predictions[0]), predictions, guidance), len(predictions)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_sum_is_left_to_the_step(name):
    expression, count = EXPRESSIONS[name]
    exact = expression(X.double(), UNCOND.double(), COND.double(), sigmas().double())
    made = expression(X, *two_calls(), sigmas())
    got, predictions = weighed(made)
    assert predictions == count
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(made.clone(), expression(X, UNCOND, COND, sigmas()))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_sum_in_inference_mode(name):
    """torch does not count there who writes to a tensor: it is copied where it is added, once if it stays the same."""
    expression, count = EXPRESSIONS[name]
    with torch.inference_mode():
        x = X.clone()
        made = expression(x, *two_calls(), sigmas())
        x.mul_(2.0)
        got, predictions = weighed(made)
    exact = expression(X.double(), UNCOND.double(), COND.double(), sigmas().double())
    assert predictions == {"x_0 and back, by samples": 1}.get(name, count)
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


COMPUTED = {
    "from nothing": lambda x, u, c, sigma: 0 - c,
    "a mask that broadcasts": lambda x, u, c, sigma: x + c * torch.ones(2, 1, 1, 5),
    "another shape": lambda x, u, c, sigma: x[:1] - c,
    "a number": lambda x, u, c, sigma: c + 1.0,
    "a parameter": lambda x, u, c, sigma: x.clone().requires_grad_() - c,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_other_sums_are_computed(name):
    got, expected = (COMPUTED[name](X, *of, sigmas()) for of in (two_calls(), (UNCOND, COND)))
    assert type(got) is torch.Tensor
    assert torch.equal(got, expected)


def test_division_by_zero_is_the_pipeline_s():
    sigma = torch.zeros(2)
    got, expected = (velocity_of_x0(X, *of, sigma) for of in (two_calls(), (UNCOND, COND)))
    assert type(got) is torch.Tensor
    assert torch.equal(got, expected)


def test_a_norm_of_outputs_that_were_used_is_a_number():
    u, c = two_calls()
    norm = (c - u).norm()
    assert type(norm) is torch.Tensor
    for got, expected in ((X - c, X - COND), ((c - u) / norm, (COND - UNCOND) / (COND - UNCOND).norm())):
        assert torch.equal(got.clone(), expected)


def test_what_is_written_to_since_is_refused():
    x, sigma = X.clone(), sigmas()
    first, second = velocity_of_x0(x, *two_calls(), sigma), x0_and_back(x, *two_calls(), sigma)
    exact = velocity_of_x0(X.double(), UNCOND.double(), COND.double(), sigmas().double())
    sigma[1] = 3.0  # which was read at once
    torch.testing.assert_close(weighed(first)[0], exact, rtol=1e-6, atol=1e-6)
    assert type(second) is Combined
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="a tensor that was added to the model's output was written to after"):
        resolved(second, X, None)


# ---- Pipelines ----


class Converting(diffusers.DiffusionPipeline):
    """A pipeline that converts predictions by the scheduler's sigmas, as one of the expressions says."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, expression):
        self.scheduler.set_timesteps(5)
        for i, t in enumerate(self.scheduler.timesteps):
            u, c = self.unet(latents, t)[0].float().chunk(2)
            velocity = expression(latents, u, c, self.scheduler.sigmas[i].expand(2))
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents


GUIDED, ALONE = "fused with guidance", "fused without guidance"


@pytest.mark.parametrize(
    ("name", "mode", "kind"),
    [
        ("x_0 and back", torch.no_grad, GUIDED),
        ("x_0 and back", torch.inference_mode, GUIDED),
        ("x_0 and back, alone", torch.no_grad, ALONE),
        ("a velocity", torch.no_grad, GUIDED),
        ("a velocity", torch.inference_mode, GUIDED),
        ("added first", torch.no_grad, GUIDED),
    ],
)
def test_a_pipeline_that_converts_predictions(name, mode, kind):
    def model(x):
        return torch.cat([torch.tanh(x), torch.sin(2.0 * x)])

    pipe = Converting(FreeModel(model), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    expression, _ = EXPRESSIONS[name]
    with mode():
        before = pipe(X.clone(), expression)
        done = fused.accelerate(pipe)
        torch.testing.assert_close(pipe(X.clone(), expression), before, rtol=1e-5, atol=1e-5)
    assert done.counts == {kind: 5}
