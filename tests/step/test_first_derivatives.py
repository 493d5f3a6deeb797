"""What a gradient is not right for is refused in words: second derivatives, and what was changed in place since."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Classifier, ClassifierFree, Composed, History, log_prob_of
from tests.step.test_gradients import SCHEDULE, draws

PLAIN, CLIPPED = fastguide.ddim(SCHEDULE, 6), fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
LEARNED = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range")
DDPM = fastguide.ddpm(SCHEDULE, 6)


def scale():
    return torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def of_a_square(x, *others):
    return fastguide.guided_step(CLIPPED, 2, x, others[0]).square().sum(), x


def of_a_scale(x, u, c, *others):
    """What comes in is a constant, and yet the gradient of the scale depends on the predictions."""
    s = scale()
    return fastguide.guided_step(PLAIN, 2, x, [u, c], ClassifierFree(s)).sum(), s


def of_moments(x, u, c, *others):
    return fastguide.guided_step(PLAIN, 2, x, [u, c], AdaptiveProjected(2.0)).sum(), u


def of_a_variance(x, u, v, z):
    return fastguide.guided_step(LEARNED, 2, x, u, variance=v, noise=z).sum(), v


def of_a_log_probability(x, u, c, *others):
    return log_prob_of(DDPM, 2, x, u, None, c).sum(), u


@pytest.mark.parametrize("make", [of_a_square, of_a_scale, of_moments, of_a_variance, of_a_log_probability])
def test_second_derivatives_are_refused(make):
    inputs = draws(4)
    loss, leaf = make(*inputs)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone, as its backward pass is not recorded"):
        (gradient.square().sum() + sum(t.sum() for t in inputs)).backward()
    loss, leaf = make(*inputs)
    (expected,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient.detach(), expected)


def of_a_scale_s_logarithm(x, u, c, *others):
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    return fastguide.guided_step(PLAIN, 2, x, [u, c], ClassifierFree(t.exp())).square().sum(), t


def of_a_model(x, u, c, *others):
    return fastguide.guided_step(PLAIN, 2, x, [u.tanh(), c], ClassifierFree(2.0)).square().sum(), u


def of_groups(x, u, c, *others):
    return fastguide.guided_step(PLAIN, 2, x, [u, c], AdaptiveProjected(2.0, norm_dim=1, norm_threshold=1.0)).sum(), u


@pytest.mark.parametrize(
    "make", [of_a_square, of_moments, of_a_log_probability, of_a_scale_s_logarithm, of_a_model, of_groups]
)
def test_second_derivatives_by_an_input_alone_are_refused(make):
    """Which autograd looks for from there on: what is not on the way to it is not asked."""
    loss, leaf = make(*draws(4))
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone, as its backward pass is not recorded"):
        torch.autograd.grad(gradient.square().sum(), leaf, allow_unused=True)


def test_a_refused_gradient_may_be_changed_in_place():
    x, u, c = draws(3)
    loss = fastguide.guided_step(PLAIN, 2, x, [u, c], AdaptiveProjected(2.0)).sum()
    for gradient in torch.autograd.grad(loss, [x, u, c], create_graph=True):
        before = gradient.detach().clone()
        assert torch.equal(gradient.mul_(2.0), 2.0 * before)


def test_a_gradient_that_depends_on_nothing_is_not_refused():
    x, u = draws(2)
    loss = fastguide.guided_step(CLIPPED, 2, x, u).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (gradient.sum() + u.sum()).backward()
    assert torch.equal(u.grad, torch.ones_like(u))


KINDS = {
    "classifier-free": lambda s: ClassifierFree(s),
    "per step": lambda s: ClassifierFree.per_step(s.expand(6)),
    "from w": lambda s: ClassifierFree.from_w(s),
    "composed": lambda s: Composed([s]),
    "from moments": lambda s: AdaptiveProjected(s),
    "classifier": lambda s: Classifier(None, s) + ClassifierFree(2.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_was_changed_since_is_refused(kind, dtype):
    x, u, c = (t.detach() for t in draws(3))
    s = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    guidance = KINDS[kind](s)
    gradient = x if kind == "classifier" else None

    def step():
        fastguide.guided_step(PLAIN, 2, x, [u, c], guidance, gradient=gradient).square().sum().backward()

    step()
    step()  # twice is no change
    assert s.grad.dtype == dtype
    with torch.no_grad():  # as an optimizer does
        s.sub_(0.1 * s.grad)
    with pytest.raises(RuntimeError, match=r"(guidance_scale.*|w): expected a tensor that is as it was"):
        step()
    guidance = KINDS[kind](s)
    step()


def test_a_history_that_was_written_since_is_noticed():
    """By torch's own count, also where the writing step is not recorded."""
    table = fastguide.dpm_solver(SCHEDULE, 6)
    for calls in (1, 3):  # the first of such a kind, and those that are repeated
        x, p = draws(2)
        history = History(table, x)
        fastguide.guided_step(table, 0, x, p, history=history)
        loss = history.entries.square().sum()
        with torch.no_grad():
            for call in range(1, calls + 1):
                fastguide.guided_step(table, call, x, p, history=history)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
