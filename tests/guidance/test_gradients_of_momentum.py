"""Gradients through what guidance with momentum adds up: of steps in a row, of log-probabilities, and of whole runs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import fastguide
from fastguide import AdaptiveProjected, History, Momentum, Sampler, guided_step, log_prob_of
from tests.sampling.test_differentiable import gradients, parameters
from tests.step.test_gradients import BOTH, SCHEDULE, draws
from tests.support.loop_cases import COND, DDIM, DPM, UNCOND, Model, x_T

TABLE, NOISY = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.5), fastguide.ddpm(SCHEDULE, 6)
CALLS, BETA = 3, -0.4


def guidance(scale=3.0, **options):
    return AdaptiveProjected(scale, eta=0.3, norm_threshold=1.2, momentum=BETA, **options)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("options", [{"base": "uncond"}, {"base": "cond", "space": "original"}], ids=["u", "c of x_0"])
def test_steps_in_a_row(options, backend):
    """The later ones depend on all earlier predictions; the scale is an input as well."""

    def run(x, scale, *pairs):
        weigh = guidance(scale, **options)
        momentum = Momentum(TABLE, weigh, x)
        for call in range(CALLS):
            pair = pairs[2 * call : 2 * call + 2]
            x = guided_step(TABLE, call, x, pair, weigh, momentum=momentum, backend=backend)
        return x, momentum.unit * momentum.values

    x, *pairs = draws(1 + 2 * CALLS)
    scale = torch.tensor([3.0, 1.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, scale, *pairs), fast_mode=True)


@pytest.mark.parametrize("predicted", [torch.float32, torch.bfloat16])
def test_as_exact_as_torch_s_own(predicted, generator):
    """Against algorithm 1 of the paper in float64: the error is at most twice that of the same in float32."""
    x, *others, weigh = torch.randn(2 + 2 * CALLS, 2, 3, 9, 7, generator=generator).unbind(0)
    pairs = [tensor.to(predicted) for tensor in others]
    table = fastguide.ddim(SCHEDULE, 6)
    row = {name: values.tolist() for name, values in table.coefficients().items()}

    def by_hand(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *pairs)]
        y, r = leaves[0], 0.0
        for call in range(CALLS):
            u, c = leaves[1 + 2 * call : 3 + 2 * call]
            r = (c - u) + BETA * r
            norm, length = (t.square().sum((1, 2, 3), keepdim=True).sqrt() for t in (r, c))
            shift = (1.2 / norm).clamp(max=1.0) * r
            along = (shift * c).sum((1, 2, 3), keepdim=True) / length.square() * c
            m = u + 3.0 * (shift - 0.7 * along)
            x0 = row["x0_scale"][call] * (row["x0_sample"][call] * y + row["x0_pred"][call] * m)
            y = row["out_x0"][call] * x0 + row["out_sample"][call] * y + row["out_pred"][call] * m
        return torch.autograd.grad(y, leaves, weigh.to(dtype))

    leaves = [t.clone().requires_grad_() for t in (x, *pairs)]
    y, momentum = leaves[0], Momentum(table, guidance(), x)
    for call in range(CALLS):
        y = guided_step(table, call, y, leaves[1 + 2 * call : 3 + 2 * call], guidance(), momentum=momentum)
    got = torch.autograd.grad(y, leaves, weigh)
    for ours, leaf, single, truth in zip(got, leaves, by_hand(torch.float32), by_hand(torch.float64), strict=True):
        assert ours.dtype == leaf.dtype
        # A prediction is read by the step and by the sum: its gradient is of parts, which are rounded four times
        rounding = 4 * torch.finfo(leaf.dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * (single.double() - truth).abs().max() + rounding


@pytest.mark.parametrize("learned", ["the scale", "what is before"])
def test_two_loops_and_one_backward_pass(learned, generator):
    """Predictions that need no gradient are added up to what does not either, and what autograd keeps all the same."""
    x, u, c = torch.randn(3, 2, 3, 4, 4, generator=generator).unbind(0)
    leaf = torch.tensor(2.0, requires_grad=True)
    weigh = guidance(leaf if learned == "the scale" else 2.0)

    def loop(momentum):
        y = x if learned == "the scale" else leaf * x
        for call in range(CALLS):
            y = guided_step(TABLE, call, y, [u, c], weigh, momentum=momentum)
        return y.square().sum()

    momentum = Momentum(TABLE, weigh, x)
    (twice,) = torch.autograd.grad(loop(momentum) + loop(momentum.restart()), leaf)
    (once,) = torch.autograd.grad(loop(Momentum(TABLE, weigh, x)), leaf)
    torch.testing.assert_close(twice, 2 * once)


def test_steps_that_are_not_recorded_leave_what_was(generator):
    """They go on from the sums, in memory of their own: a step, and a log-probability."""
    x, u, c = torch.randn(3, 2, 3, 4, 4, generator=generator).unbind(0)
    scale = torch.tensor(2.0, requires_grad=True)
    found = []
    for recorded in (True, False):
        weigh = guidance(scale)
        for rest in (guided_step, log_prob_of):
            momentum = Momentum(NOISY, weigh, x)
            with torch.set_grad_enabled(recorded):
                y = guided_step(NOISY, 0, x, [u, c], weigh, noise=u, momentum=momentum)
            with torch.no_grad():
                options = {"noise": u} if rest is guided_step else {"next_sample": c}
                found.append(rest(NOISY, 1, y, [u, c], weigh, **options, momentum=momentum))
            if recorded:
                y.sum().backward()
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert torch.equal(ours, theirs)


def test_log_probabilities():
    """Of a step at once and looked at later: the same value to the bit, and gradients of all earlier predictions."""

    def run(x, y, z, *pairs):
        momentum, total = Momentum(NOISY, guidance(), x), 0.0
        for call in range(2):
            total = total + log_prob_of(
                NOISY, call, x, pairs[2 * call : 2 * call + 2], guidance(), y, momentum=momentum
            )
        return total

    x, y, z, *pairs = draws(7)
    assert gradcheck(run, (x, y, z.detach(), *pairs), fast_mode=True)
    sums = [Momentum(NOISY, guidance(), x) for _ in range(3)]
    following, first = guided_step(NOISY, 0, x, pairs[:2], guidance(), noise=z, momentum=sums[0], return_log_prob=True)
    again = log_prob_of(NOISY, 0, x, pairs[:2], guidance(), following.detach(), momentum=sums[1])
    with torch.no_grad():
        plain = log_prob_of(NOISY, 0, x, pairs[:2], guidance(), following, momentum=sums[2])
    assert first.requires_grad
    assert again.requires_grad
    assert torch.equal(first, again)
    assert torch.equal(first, plain)
    assert torch.equal(sums[0].values, sums[2].values)


@pytest.mark.parametrize("table", [DDIM, DPM], ids=lambda table: table.name)
def test_whole_runs(table):
    """With checkpoints and without, all steps and the last ones: the sampler's samples, and the same gradients."""
    model, x = Model(), x_T()
    sampler, options = Sampler(model, table, guidance()), {"cond": COND, "uncond": UNCOND}
    torch.testing.assert_close(sampler.differentiable(x, **options), sampler(x, **options), rtol=1e-6, atol=1e-6)
    for last in (None, 2):
        kept = gradients(sampler, x, last=last, checkpoint=False, **options)
        for ours, theirs in zip(gradients(sampler, x, last=last, **options), kept, strict=True):
            torch.testing.assert_close(ours, theirs)

    y, momentum, history = x, Momentum(table, guidance(), x), History(table, x)
    for call in range(len(table)):
        t = table.timesteps[call].expand(6)
        both = model(torch.cat([y] * 2), t, torch.cat([UNCOND, COND]))
        y = guided_step(table, call, y, both, guidance(), momentum=momentum, history=history)
    weigh = torch.linspace(-1, 1, x.numel()).view(x.shape)
    by_hand = torch.autograd.grad((weigh * y).sum(), parameters(model))
    for ours, theirs, some in zip(gradients(sampler, x, **options), by_hand, kept, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, some)


def test_a_new_loop_of_a_momentum_leaves_the_old_graph():
    x, u, c = draws(3)
    momentum = Momentum(TABLE, guidance(), x)
    for _ in range(2):
        y = guided_step(TABLE, 0, x, [u, c], guidance(), momentum=momentum.restart())
        guided_step(TABLE, 1, y, [u, c], guidance(), momentum=momentum).sum().backward()
        assert momentum.values.requires_grad
    assert not momentum.restart().values.requires_grad
    with torch.no_grad():
        place = momentum.values
        guided_step(TABLE, 0, x, [u, c], guidance(), momentum=momentum)
        assert momentum.values is place  # in place, as nothing is recorded
