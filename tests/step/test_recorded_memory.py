"""Recorded steps whose tensors share memory, are views, or come back otherwise: right gradients, or words."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree, NoiseSchedule, Normalized
from fastguide.step.backends.registry import BACKENDS

SCHEDULE, SHAPE = NoiseSchedule.linear(), (2, 3, 8, 6)
CLIPPED = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
LEARNED = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range", clip_sample_range=1.0)
BOTH = [name for name in ("reference", "native") if BACKENDS[name].devices != ()]
GUIDANCES = {
    "constants": lambda scale: ClassifierFree(scale.detach()),
    "a scale": ClassifierFree,
    "moments": AdaptiveProjected,
    "groups": lambda scale: Normalized(scale, dim=1),
}
each_backend = pytest.mark.parametrize("backend", BOTH)


def draw(number, shape=SHAPE, *, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(shape).to(memory_format=layout).requires_grad_() for _ in range(number)]


def agree(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@each_backend
@pytest.mark.parametrize("name", GUIDANCES)
def test_hooks_may_lay_out_saved_tensors_anew(name, backend):
    """As those that write them to a file, or to pinned memory, do."""
    x, uncond, cond = draw(3, channels_last=True)
    scale, weigh = torch.tensor([2.0, 3.0], requires_grad=True), torch.randn(SHAPE)

    def step():
        return fastguide.guided_step(CLIPPED, 2, x, [uncond, cond], GUIDANCES[name](scale), backend=backend)

    inputs = [x, uncond, cond, scale]
    expected = torch.autograd.grad(step(), inputs, weigh, allow_unused=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        y = step()
    agree(torch.autograd.grad(y, inputs, weigh, allow_unused=True), expected)


@each_backend
def test_hooks_and_a_learned_variance(backend):
    inputs = draw(5, channels_last=True)
    x, uncond, cond, variance, noise = inputs
    stacked, weigh = torch.cat([uncond, cond]), torch.randn(SHAPE)

    def step():
        return fastguide.guided_step(
            LEARNED, 2, x, stacked, ClassifierFree(torch.tensor(2.0, requires_grad=True)), variance=variance,
            noise=noise, backend=backend,
        )  # fmt: skip

    expected = torch.autograd.grad(step(), inputs, weigh, retain_graph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        y = step()
    agree(torch.autograd.grad(y, inputs, weigh, retain_graph=True), expected)


@each_backend
def test_a_gradient_that_is_negative_by_a_bit(backend):
    """As the imaginary part of a conjugate's is."""
    x, p = draw(2)
    y, weigh = fastguide.guided_step(CLIPPED, 2, x, p, backend=backend), torch.randn(SHAPE)
    expected = torch.autograd.grad(y, [x, p], -weigh, retain_graph=True)
    agree(torch.autograd.grad(y, [x, p], torch._neg_view(weigh)), expected)


@each_backend
def test_the_predicted_original_in_a_part_of_a_larger_tensor(backend):
    x, p = draw(2)
    weigh = torch.randn(SHAPE)

    def gradients(whole, place):
        y = fastguide.guided_step(CLIPPED, 2, x, p, original=place, backend=backend)
        return torch.autograd.grad((whole * whole).sum() + (y * weigh).sum(), [x, p])

    alone, way = torch.zeros(SHAPE), torch.zeros(3, *SHAPE)
    expected = gradients(alone, alone)
    agree(gradients(way, way[1]), expected)
    assert torch.equal(way[1], alone)
    assert not way[0].any()


@each_backend
@pytest.mark.parametrize("which", ["sample", "predictions[1]", "variance", "noise"])
def test_the_predicted_original_in_the_place_of_what_is_read_again(which, backend):
    """Gradients would be made of x_0, and torch counts no write that comes before a tensor is kept."""
    x, uncond, cond, variance, noise = (t.detach() * 1 for t in draw(5))
    variance.requires_grad_()
    places = {"sample": x, "predictions[1]": cond, "variance": variance, "noise": noise}
    scale, before = torch.tensor(2.0, requires_grad=True), places[which].clone()
    with pytest.raises(
        ValueError, match=rf"^original: expected memory apart from {which.replace('[', '.').replace(']', '.')}"
    ):
        fastguide.guided_step(
            LEARNED, 2, x, [uncond, cond], ClassifierFree(scale), variance=variance, noise=noise,
            original=places[which], backend=backend,
        )  # fmt: skip
    assert torch.equal(places[which], before)


@each_backend
def test_a_step_that_is_refused_draws_nothing(backend):
    x, uncond, cond = (t.detach() * 1 for t in draw(3))
    generator, scale = torch.Generator().manual_seed(1), torch.tensor(2.0, requires_grad=True)
    before = generator.get_state()
    table = fastguide.ddpm(SCHEDULE, 6)
    with pytest.raises(ValueError, match="original: expected memory apart from sample"):
        fastguide.guided_step(
            table, 2, x, [uncond, cond], ClassifierFree(scale), generator=generator, original=x, backend=backend
        )
    assert torch.equal(generator.get_state(), before)


@each_backend
@pytest.mark.parametrize("part", [False, True], ids=["", "a part"])
def test_a_leaf_is_no_place_for_the_predicted_original(part, backend):
    leaf, generator = torch.zeros(2, *SHAPE, requires_grad=True), torch.Generator().manual_seed(1)
    place = leaf[1] if part else torch.zeros(SHAPE, requires_grad=True)
    before = generator.get_state()
    with pytest.raises(ValueError, match="original: expected no leaf that requires a gradient, nor a view of one"):
        fastguide.guided_step(
            fastguide.ddpm(SCHEDULE, 6), 2, *draw(2), generator=generator, original=place, backend=backend
        )
    assert not place.any()
    assert torch.equal(generator.get_state(), before)


def under(mode, make):
    with mode():
        return make()


class FirstOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both):
        return both[0]

    @staticmethod
    def backward(ctx, grad):
        return torch.stack([grad, torch.zeros_like(grad)])


NOT_WRITTEN = {
    "unbind": (lambda: torch.zeros(2, *SHAPE).unbind()[0], r"a view that unbind\(\)"),
    "unbind, recorded": (lambda: torch.zeros(2, *SHAPE, requires_grad=True).mul(1).unbind()[0], r"a view that unbind"),
    "a view of it": (lambda: torch.zeros(2, *SHAPE).unbind()[0].view(SHAPE), r"a view that unbind\(\)"),
    "split": (lambda: torch.zeros(2 * SHAPE[0], *SHAPE[1:]).split(SHAPE[0])[1], r"a view that unbind\(\), split\(\)"),
    "no_grad": (lambda: under(torch.no_grad, lambda: torch.zeros(2, *SHAPE)[0]), r"made under torch.no_grad\(\)"),
    "inference": (lambda: under(torch.inference_mode, lambda: torch.zeros(SHAPE)), "an inference tensor"),
    "a Function": (lambda: FirstOf.apply(torch.zeros(2, *SHAPE)), "a view that a torch.autograd.Function returned"),
    "a view of inference mode": (
        lambda: (lambda both: under(torch.inference_mode, lambda: both[0]))(torch.zeros(2, *SHAPE)),
        "a view that was made in inference mode",
    ),
}


@each_backend
@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_autograd_lets_nobody_write_to_is_no_place_for_the_predicted_original(name, backend):
    make, reason = NOT_WRITTEN[name]
    place, generator, table = make(), torch.Generator().manual_seed(1), fastguide.ddpm(SCHEDULE, 6)
    before = generator.get_state()
    for options in ({}, {"return_log_prob": True}):
        with pytest.raises(
            ValueError, match=f"^original: expected a tensor that autograd lets be written to.*{reason}"
        ):
            fastguide.guided_step(table, 2, *draw(2), generator=generator, original=place, backend=backend, **options)
        assert not place.any()
        assert torch.equal(generator.get_state(), before)
    with torch.inference_mode(place.is_inference()), torch.no_grad():  # nothing is recorded
        fastguide.guided_step(table, 2, *draw(2), generator=generator, original=place, backend=backend)
    assert place.all()


@each_backend
def test_the_predicted_original_in_the_place_of_what_is_not_read_again(backend):
    x, p = draw(2)
    weigh = torch.randn(SHAPE)

    def gradients(sample, place):
        y = fastguide.guided_step(CLIPPED, 2, sample, p, original=place, backend=backend)
        return torch.autograd.grad((place * place).sum() + (y * weigh).sum(), [x, p])

    sample = x * 1
    agree(gradients(sample, sample), gradients(x * 1, torch.zeros(SHAPE)))


@each_backend
@pytest.mark.parametrize("name", GUIDANCES)
def test_a_batch_of_none(name, backend):
    x, uncond, cond = draw(3, (0, *SHAPE[1:]))
    scale = torch.tensor(2.0, requires_grad=True)
    y = fastguide.guided_step(CLIPPED, 2, x, [uncond, cond], GUIDANCES[name](scale), backend=backend)
    found = torch.autograd.grad(y, [x, uncond, cond, scale], torch.zeros_like(y), allow_unused=True)
    assert [grad.shape for grad in found[:3]] == [x.shape] * 3
    assert found[3] is None or found[3] == 0


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", GUIDANCES)
def test_within_checkpoints_and_autocast(name, reentrant, backend):
    inputs = [*draw(3), torch.tensor([2.0, 3.0], requires_grad=True)]
    weigh = torch.randn(SHAPE)

    def step(x, uncond, cond, scale):
        return fastguide.guided_step(CLIPPED, 2, x, [uncond, cond], GUIDANCES[name](scale), backend=backend)

    def gradients(make):
        for tensor in inputs:
            tensor.grad = None
        make().backward(weigh)
        return [tensor.grad for tensor in inputs]

    expected = gradients(lambda: step(*inputs))
    agree(gradients(lambda: checkpoint(step, *inputs, use_reentrant=reentrant)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        agree(gradients(lambda: step(*inputs)), expected)
