"""Gradients of several vectors at a time, by both of torch's ways to map over a backward pass: each one's own bits."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Classifier, ClassifierFree, History, Momentum
from tests.step.test_gradients import SCHEDULE

SHAPE = (2, 3, 5, 4)
PLAIN, CLIPPED = fastguide.ddim(SCHEDULE, 6), fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
DDPM = fastguide.ddpm(SCHEDULE, 6)
LEARNED = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range")


def of_a_step(guidance, table=CLIPPED, **options):
    return lambda x, u, c, s: [fastguide.guided_step(table, 2, x, [u, c], guidance(s), **options)]


def of_an_original(x, u, c, s):
    original = torch.zeros(SHAPE)
    return [fastguide.guided_step(PLAIN, 2, x, [u, c], ClassifierFree(s), original=original), original]


def of_a_classifier(x, u, c, s):
    guidance = ClassifierFree(s) + Classifier(None, s, "epsilon")
    return [fastguide.guided_step(CLIPPED, 2, x, [u, c], guidance, gradient=u * c)]


def of_a_learned_variance(x, u, c, s):
    return fastguide.guided_step(LEARNED, 2, x, [u], None, variance=c, seeds=torch.tensor([1, 2]), return_log_prob=True)


def of_a_log_probability(x, u, c, s):
    return fastguide.guided_step(
        DDPM, 2, x, [u, c], ClassifierFree(s), seeds=torch.tensor([1, 2]), return_log_prob=True
    )


def of_two_steps(x, u, c, s):
    table = fastguide.dpm_solver(SCHEDULE, 6)
    history = History(table, x.detach())
    y = fastguide.guided_step(table, 0, x, [u, c], ClassifierFree(s), history=history)
    return [fastguide.guided_step(table, 1, y, [u * y, c], ClassifierFree(s), history=history), history.entries]


def of_momentum(x, u, c, s):
    guidance = AdaptiveProjected(s, momentum=-0.5)
    momentum = Momentum(PLAIN, guidance, x.detach())
    y = fastguide.guided_step(PLAIN, 0, x, [u, c], guidance, momentum=momentum)
    return [fastguide.guided_step(PLAIN, 1, y, [u, c * y], guidance, momentum=momentum)]


CASES = {
    "classifier-free": of_a_step(ClassifierFree),
    "one prediction": lambda x, u, c, s: [fastguide.guided_step(PLAIN, 2, x, u)],
    "moments": of_a_step(lambda s: ClassifierFree(s, guidance_rescale=0.7)),
    "groups": of_a_step(lambda s: AdaptiveProjected(s, norm_dim=1, norm_threshold=1.0)),
    "original": of_an_original,
    "classifier": of_a_classifier,
    "learned variance": of_a_learned_variance,
    "log-probability": of_a_log_probability,
    "history": of_two_steps,
    "momentum": of_momentum,
}


def inputs():
    shapes = [SHAPE, SHAPE, SHAPE, (2,)]
    return [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]


def results(name):
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    outputs = CASES[name](*leaves)
    vectors = [torch.randn(5, *out.shape, dtype=out.dtype) for out in outputs]
    vectors = [each.transpose(1, 2).contiguous().transpose(1, 2) if each.dim() > 2 else each for each in vectors]

    def gradients(vectors, **options):
        return torch.autograd.grad(outputs, leaves, vectors, retain_graph=True, allow_unused=True, **options)

    return gradients, vectors, [gradients([each[k] for each in vectors]) for k in range(5)]


def assert_same(got, expected):
    for grads, each in zip(got, zip(*expected, strict=True), strict=True):
        if grads is None:
            assert each == (None,) * len(expected)
        else:
            assert torch.equal(grads, torch.stack(each))


@pytest.mark.parametrize("name", CASES)
def test_batches_of_gradients(name):
    gradients, vectors, expected = results(name)
    assert_same(gradients(vectors, is_grads_batched=True), expected)


@pytest.mark.parametrize("name", CASES)
def test_mapped_over_by_vmap(name):
    gradients, vectors, expected = results(name)
    used = [grad is not None for grad in expected[0]]

    def of(*vectors):
        return tuple(grad for grad in gradients(vectors) if grad is not None)

    got = iter(torch.vmap(of)(*vectors))
    assert_same([next(got) if each else None for each in used], expected)
    moved = torch.vmap(of, in_dims=-1, out_dims=-1)(*[each.movedim(0, -1) for each in vectors])
    got = iter(moved)
    assert_same([next(got).movedim(-1, 0) if each else None for each in used], expected)


def test_batches_of_batches():
    """By both ways, one within the other, and twice by one."""
    gradients, (vectors,), expected = results("classifier-free")
    four = vectors[:4].unflatten(0, (2, 2))
    whole = [torch.stack(each[:4]).unflatten(0, (2, 2)) for each in zip(*expected, strict=True)]
    for of in (
        torch.vmap(torch.vmap(gradients, in_dims=([0],)), in_dims=([0],)),
        torch.vmap(lambda vectors: gradients(vectors, is_grads_batched=True), in_dims=([0],)),
    ):
        for got, each in zip(of([four]), whole, strict=True):
            assert torch.equal(got, each)


@pytest.mark.parametrize("guidance", ["classifier-free", "moments"])
def test_no_vectors_give_no_gradients(guidance):
    """Of ``vmap`` alone: torch's older way refuses an empty batch itself."""
    x, u, c = (torch.randn(SHAPE, requires_grad=True) for _ in range(3))
    (made,) = CASES[guidance](x, u, c, torch.tensor(3.0))
    of_each = torch.vmap(lambda v: torch.autograd.grad(made, [x, u, c], v, retain_graph=True))
    assert [grad.shape for grad in of_each(torch.randn(0, *SHAPE))] == [(0, *SHAPE)] * 3
    assert all(grad.isfinite().all() for grad in of_each(torch.randn(1, *SHAPE)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_jacobian_at_once(create_graph):
    x, u, c, s = inputs()
    call = CASES["moments"]

    def step(x, u):
        return call(x, u, c, s)[0]

    of = torch.autograd.functional.jacobian
    got, expected = (of(step, (x, u), vectorize=how, create_graph=create_graph) for how in (True, False))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivatives_are_refused():
    x, u, c, s = [tensor.requires_grad_() for tensor in inputs()]
    (y,) = CASES["classifier-free"](x, u, c, s)
    vectors = torch.randn(3, *SHAPE)
    (found,) = torch.autograd.grad(y, s, vectors, is_grads_batched=True, create_graph=True)
    (again,) = torch.vmap(lambda vector: torch.autograd.grad(y, s, vector, create_graph=True))(vectors)
    for gradient in (found, again):
        with pytest.raises(
            RuntimeError, match="expected first derivatives alone, as its backward pass is not recorded"
        ):
            gradient.sum().backward()
