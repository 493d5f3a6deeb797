"""Gradients through weights that are made of the predictions, and what no gradient goes through, refused in words."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck

import fastguide
from fastguide import (
    AdaptiveProjected,
    Classifier,
    ClassifierFree,
    Cursor,
    Guidance,
    Inpainting,
    MagnitudeAware,
    Normalized,
    PerpNeg,
    Perturbed,
    Tangential,
    ZeroStar,
)
from fastguide.step.backward import unknown_fields
from fastguide.step.operator import StepArguments
from tests.step.test_gradients import BOTH, SCHEDULE, draws

DDIM = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
MADE = {  # of one scale, which is an input too
    "rescaled": (2, lambda s: ClassifierFree(s, guidance_rescale=0.7)),
    "rescaled, of x_0": (2, lambda s: ClassifierFree(s, guidance_rescale=0.7, space="original")),
    "zero star": (2, lambda s: ZeroStar(s, zero_init_steps=0)),
    "projected": (2, lambda s: AdaptiveProjected(s, eta=0.3, norm_threshold=1.0)),
    "projected, in an interval": (
        2,
        lambda s: AdaptiveProjected(s, eta=0.3, norm_threshold=1.0).within(DDIM, 0.0, 0.2),
    ),
    "projected, of x_0": (2, lambda s: AdaptiveProjected(s, norm_threshold=1.0, space="original")),
    "tangential": (2, Tangential),
    "magnitude": (2, MagnitudeAware),
    "normalized": (2, Normalized),
    "perpendicular": (3, PerpNeg),
    "perturbed, rescaled": (3, lambda s: Perturbed(s, 2.0, guidance_rescale=0.5)),
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", MADE)
def test_weights_from_moments(name, backend):
    count, make = MADE[name]

    def run(x, scale, *predictions):
        return fastguide.guided_step(DDIM, 3, x, predictions, make(scale), backend=backend)

    x, *predictions = draws(count + 1)
    scale = torch.tensor([3.0, 1.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, scale, *predictions), fast_mode=True)


@pytest.mark.parametrize("backend", BOTH)
def test_weights_from_moments_beside_a_classifier(backend):
    def run(x, stacked, g, s):
        guidance = AdaptiveProjected(4.0, norm_threshold=1.0) + Classifier(None, s)
        return fastguide.guided_step(DDIM, 3, x, stacked, guidance, gradient=g, backend=backend)

    (x, g), (stacked,) = draws(2), draws(1, seed=1, shape=(4, 3, 3))
    assert gradcheck(
        run, (x, stacked, g, torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)), fast_mode=True
    )


@pytest.mark.parametrize("name", ["rescaled", "projected", "tangential"])
def test_the_forward_pass_is_the_same_to_the_bit(name):
    count, make = MADE[name]
    x, *predictions = (t.detach().float() for t in draws(count + 1))
    expected = fastguide.guided_step(DDIM, 3, x, predictions, make(3.0))
    got = fastguide.guided_step(DDIM, 3, x.requires_grad_(), predictions, make(3.0))
    assert got.requires_grad
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BOTH)
def test_weights_of_a_function_s_own(backend):
    """Its parameters may be all that there is to learn."""

    def run(x, uncond, cond, learned):
        def weights(predictions):
            scale = learned * predictions[1].flatten(1).square().mean(1)
            return torch.stack([1 - scale, scale], 1)

        return fastguide.guided_step(DDIM, 3, x, [uncond, cond], Guidance.from_predictions(weights, 2), backend=backend)

    learned = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, uncond, cond = draws(3)
    assert gradcheck(run, (x, uncond, cond, learned), fast_mode=True)
    assert gradcheck(run, (x.detach(), uncond.detach(), cond.detach(), learned), fast_mode=True)


LEAF = torch.randn(2, 3, 3).requires_grad_()


def step(**changed):
    arguments = {"table": DDIM, "index": 2, "sample": LEAF, "predictions": torch.zeros(2, 3, 3)} | changed
    return fastguide.guided_step(**arguments)


def with_cursor():
    x = torch.zeros(2, 3)
    return step(index=Cursor().start(DDIM), sample=x, out=x, predictions=x.clone().requires_grad_())


X = torch.zeros(2, 3, 3)
REFUSED = [
    (with_cursor, ValueError, "index: expected an int or a tensor where gradients are recorded, got a Cursor"),
    (lambda: step(out=X.clone()), ValueError, "out: expected None where gradients are recorded, got a tensor"),
    (lambda: step(staged=X.clone()), ValueError, "staged: expected None where gradients are recorded, got a tensor"),
    (
        lambda: step(inpainting=Inpainting(X.clone().requires_grad_(), X, X)),
        ValueError,
        r"inpainting.mask: expected one that requires no grad",
    ),
    (lambda: step(predictions=torch.zeros(2, 3)), ValueError, r"predictions\[0\]: expected shape \(2, 3, 3\)"),
    (
        lambda: torch.func.grad(lambda x: step(sample=x, predictions=X).sum())(X),
        NotImplementedError,
        "guided_step: expected no tensors of torch.func, whose transforms it lacks",
    ),
    (
        lambda: torch.vmap(lambda x: step(sample=x, predictions=X))(torch.zeros(4, 2, 3, 3)),
        NotImplementedError,
        "guided_step: expected no tensors of torch.func, whose transforms it lacks",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_forms_without_a_gradient_are_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_other_derivatives_are_refused():
    x, p = (t.detach().float() for t in draws(2))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        fastguide.guided_step(DDIM, 2, forward_ad.make_dual(x, p), p)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="guidance_scale: expected no tangents"):
        fastguide.ClassifierFree(forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0)))
    with pytest.raises(NotImplementedError, match=r"guidance_scale: expected no tensors of torch\.func"):
        torch.func.vmap(lambda scale: fastguide.guided_step(DDIM, 2, x, [p, p], fastguide.ClassifierFree(scale)))(x)


def test_a_compiled_function_makes_such_steps_outside_of_its_graph():
    torch._dynamo.reset()
    x, p = (t.detach().float().requires_grad_() for t in draws(2))

    def run(x):
        return (2 * fastguide.guided_step(DDIM, 2, 2 * x, p)).sum()

    (expected,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, backend="eager")(x), x)
    torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"no gradients are recorded within torch\.compile"):
        torch.compile(run, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_a_field_that_no_gradient_knows_is_refused():
    """One that a step gains later: its gradient would be dropped."""
    x = torch.zeros(2, 3)
    arguments = StepArguments(x, None, None, x, [x], x, x, 0, None, None, None, None)
    assert unknown_fields(arguments) == []

    class Later(NamedTuple):
        threshold: torch.Tensor | None = None
        level: float = 0.0

    assert unknown_fields(Later()) == []
    assert unknown_fields(Later(x)) == ["threshold"]
    assert unknown_fields(Later(None, 0.5)) == ["level"]


@pytest.mark.parametrize("how", ["recorded", "with its log-probability"])
def test_the_last_weights_are_those_of_such_a_step(how):
    """It makes them in memory of its own, as other threads write to the guidance's."""
    generator = torch.Generator().manual_seed(0)
    x, uncond, cond = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3))
    table = fastguide.ddpm(fastguide.NoiseSchedule.linear(), 10)
    plain, guidance = fastguide.AdaptiveProjected(7.5), fastguide.AdaptiveProjected(7.5)
    seeds = torch.tensor([1, 2])
    fastguide.guided_step(table, 3, x, [uncond, cond], plain, seeds=seeds)
    fastguide.guided_step(table, 5, x, [cond, uncond], guidance, seeds=seeds)  # others than those that are to come
    if how == "recorded":
        fastguide.guided_step(table, 3, x, [uncond, cond.clone().requires_grad_()], guidance, seeds=seeds)
    else:
        fastguide.guided_step(table, 3, x, [uncond, cond], guidance, seeds=seeds, return_log_prob=True)
    assert torch.equal(guidance.last_weights, plain.last_weights)
