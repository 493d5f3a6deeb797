"""Log-probabilities of steps: against the textbook in float64, the same to the bit later, and differentiable."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import (
    AdaptiveProjected,
    Classifier,
    ClassifierFree,
    Cursor,
    FlowSchedule,
    History,
    Inpainting,
    NoiseSchedule,
    guided_step,
    log_prob_of,
)
from fastguide.step.backends import native
from tests.step.test_gradients import BOTH

SCHEDULE, FLOW = NoiseSchedule.linear(), FlowSchedule(shift=3.0)
SHAPE = (3, 2, 50, 53)  # a part and a tail
TABLES = {
    "ddpm": fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0),
    "ddpm learned": fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range"),
    "ddim": fastguide.ddim(SCHEDULE, 6, eta=1.0),
    "ddim half": fastguide.ddim(SCHEDULE, 6, eta=0.5, clip_sample_range=1.0),
    "euler ancestral": fastguide.euler_ancestral(SCHEDULE, 6),
    "dpm++ 2m sde": fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"),
    "dpm++ 2s sde": fastguide.dpm_solver_singlestep(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"),
    "flow stochastic": fastguide.flow_match_euler(FLOW, 6, stochastic=True),
    "flow sde": fastguide.flow_match_sde(FLOW, 6),
}
SEEDS = torch.tensor([5, 6, 7])


def randn(seed, dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def textbook(table, call, x, new, mean_of, reduction="mean", variance=None):
    """In float64; ``mean_of(noise)``: the step with that noise."""
    mean, noisy = (mean_of(value * torch.ones_like(x)) for value in (0.0, 1.0))
    sigma = noisy - mean
    density = -((new.double() - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return getattr(density.flatten(1), reduction)(1)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", TABLES)
def test_the_textbook_s_density(name, backend):
    """At two calls in a row, of which the second goes on from the first's history; as mean and as sum."""
    table, guidance = TABLES[name], ClassifierFree(3.0)
    x, predictions = randn(0), [0.5 * randn(1), 0.5 * randn(2)]
    variance = {"variance": randn(3).clamp(-1, 1)} if table.learned_variance else {}
    history, before, plain = (History(table, x) for _ in range(3))
    truth = History(table, x.double())
    for call, reduction in ((0, "mean"), (1, "sum")):
        kept = truth.entries.clone()

        def mean_of(noise, call=call, x=x, kept=kept):
            truth.entries.copy_(kept)
            truth._next = call
            exact = {name: values.double() for name, values in variance.items()}
            return guided_step(
                table, call, x.double(), [p.double() for p in predictions], guidance, noise=noise, history=truth,
                backend="reference", **exact,
            )  # fmt: skip

        silent = not table.adds_noise[call]
        if silent:
            x = guided_step(table, call, x, predictions, guidance, history=history, backend=backend)
            for other in (before, plain):
                guided_step(table, call, randn(0), predictions, guidance, history=other, backend=backend)
            mean_of(None)
            continue
        new, log_prob = guided_step(
            table, call, x, predictions, guidance, seeds=SEEDS, history=history, backend=backend,
            return_log_prob=reduction, **variance,
        )  # fmt: skip
        alone = guided_step(
            table, call, x, predictions, guidance, seeds=SEEDS, history=plain, backend=backend, **variance
        )
        assert torch.equal(new, alone)
        expected = textbook(table, call, x.double(), new, mean_of, reduction)
        torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-6)
        again = log_prob_of(
            table, call, x, predictions, guidance, new, history=before, backend=backend, reduction=reduction, **variance
        )
        assert torch.equal(log_prob, again)
        assert torch.equal(history.entries, before.entries)
        x = new


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", ["ddpm", "ddpm learned", "flow sde"])
@pytest.mark.parametrize("guidance", [None, ClassifierFree([1.0, 2.0, 5.0]), AdaptiveProjected(4.0)], ids=str)
def test_the_ratio_of_a_policy_to_itself_is_one(guidance, name, backend):
    """And the step is the same as without; also in a tensor that is given, from noise that is, and of 16 bits."""
    table, x = TABLES[name], randn(0)
    predictions = [randn(1).bfloat16(), randn(2).bfloat16()][: 1 if guidance is None else 2]
    rest = {"backend": backend} | ({"variance": randn(3).clamp(-1, 1)} if table.learned_variance else {})
    index = torch.tensor([1, 3, 2])
    for noise in ({"seeds": SEEDS}, {"noise": randn(4)}):
        expected = guided_step(table, index, x, predictions, guidance, **noise, **rest)
        out, staged = torch.empty_like(x), torch.empty(6, *SHAPE[1:])
        new, log_prob = guided_step(
            table, index, x, predictions, guidance, out=out, staged=staged, return_log_prob=True, **noise, **rest
        )
        assert new is out
        assert torch.equal(new, expected)
        assert torch.equal(staged, torch.cat([new, new]) * table.in_scales[1])
        later = log_prob_of(table, index, x, predictions, guidance, new, **rest)
        assert torch.equal((later - log_prob).exp(), torch.ones(3, dtype=torch.float64))
        asked = [p.clone().requires_grad_() for p in predictions]
        assert torch.equal(log_prob_of(table, index, x, asked, guidance, new, **rest), log_prob)
        recorded = guided_step(table, index, x, asked, guidance, return_log_prob=True, **noise, **rest)
        assert torch.equal(recorded[0], expected)
        assert torch.equal(recorded[1], log_prob)
        assert recorded[1].requires_grad


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["ddpm", "ddpm learned", "dpm++ 2m sde", "flow sde"])
def test_gradients_of_the_log_probability(name, reduction, backend):
    table = TABLES[name]

    def run(x, uncond, cond, scale, new, v):
        history = History(table, x)
        options = {"variance": v} if table.learned_variance else {}
        return log_prob_of(
            table, 0, x, [uncond, cond], ClassifierFree(scale), new, history=history, backend=backend,
            reduction=reduction, **options,
        )  # fmt: skip

    inputs = [0.5 * randn(seed, torch.float64, (2, 3, 4)).requires_grad_() for seed in range(5)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    if not table.learned_variance:
        inputs[-1] = inputs[-1].detach()
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (*inputs[:3], scale, *inputs[3:]), fast_mode=True)


def test_a_generator_is_left_as_the_step_leaves_it():
    table, x, p = TABLES["ddpm"], randn(0), randn(1)
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    new, _ = guided_step(table, 1, x, p, generator=first, return_log_prob=True)
    assert torch.equal(new, guided_step(table, 1, x, p, generator=second))
    assert torch.equal(first.get_state(), second.get_state())


@pytest.mark.skipif("native" not in BOTH, reason="the native library is not here")
def test_no_bit_depends_on_threads_or_on_others_of_the_batch():
    table, x, p, before = TABLES["flow sde"], randn(0), randn(1), torch.get_num_threads()
    _, expected = guided_step(table, 1, x, p, seeds=SEEDS, return_log_prob=True)
    try:
        torch.set_num_threads(4)
        _, got = guided_step(table, 1, x, p, seeds=SEEDS, return_log_prob=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, expected)
    _, alone = guided_step(table, 1, x[1:2], p[1:2], seeds=SEEDS[1:2], return_log_prob=True)
    assert torch.equal(alone, expected[1:2])


@pytest.mark.skipif("native" not in BOTH, reason="the native library is not here")
@pytest.mark.parametrize("capability", native.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ddpm", "flow sde"])
def test_a_step_of_tensors_in_place_makes_its_mean_in_the_same_pass(name, dtype, capability):
    """The bits are those of the step alone, and of a later look at it; the noise may be the output."""
    table, index = TABLES[name], torch.tensor([1, 3, 2])
    x, uncond, cond, noise = (randn(seed, dtype) for seed in range(4))
    before = native.cpu_capability()
    native.set_cpu_capability(capability)
    try:
        for predictions, guidance in (([uncond], None), ([uncond, cond], ClassifierFree([1.0, 2.0, 5.0]))):
            call = (table, index, x, predictions, guidance)
            expected = guided_step(*call, noise=noise)
            new, log_prob = guided_step(*call, noise=noise, return_log_prob=True)
            assert torch.equal(new, expected)
            assert torch.equal(log_prob_of(*call, new), log_prob)
            out = noise.clone()
            assert torch.equal(guided_step(*call, noise=out, out=out, return_log_prob=True)[1], log_prob)
            assert torch.equal(out, expected)
    finally:
        native.set_cpu_capability(before)


X, DDIM = torch.zeros(2, 3), fastguide.ddim(SCHEDULE, 6)
NOISE = {"seeds": torch.tensor(1)}
LAST = {"noise": X}


def with_log_prob(table, index=0, **options):
    return guided_step(table, index, X, X.clone(), **({"return_log_prob": True} | options))


REFUSED = [
    (lambda: with_log_prob(DDIM), r"got ddim's step 0; its stochastic form is ddim\(\.\.\., eta=1\.0\)"),
    (lambda: with_log_prob(fastguide.euler(SCHEDULE, 6)), "its stochastic form is euler_ancestral"),
    (lambda: with_log_prob(fastguide.flow_match_euler(FLOW, 6)), "its stochastic form is flow_match_sde"),
    (lambda: with_log_prob(fastguide.dpm_solver(SCHEDULE, 6)), "sde-dpmsolver"),
    (lambda: with_log_prob(fastguide.unipc(SCHEDULE, 6)), "expected a step that adds noise, .* got unipc's step 0$"),
    (lambda: with_log_prob(TABLES["ddpm"], 5), "got ddpm's step 5; table.adds_noise says which"),
    (lambda: with_log_prob(TABLES["ddpm"], torch.tensor([1, 5])), "got ddpm's step 5; table.adds_noise says which"),
    (lambda: log_prob_of(DDIM, 2, X, X, None, X), "got ddim's step 2"),
    (lambda: with_log_prob(TABLES["ddpm"], out=X, **NOISE), "out: expected memory apart from the inputs"),
    (lambda: with_log_prob(TABLES["ddpm"], return_log_prob="max", **NOISE), "expected 'mean' or 'sum', got 'max'"),
    (lambda: with_log_prob(TABLES["ddpm"], inpainting=Inpainting(X, X, X), **NOISE), "inpainting: expected None"),
    (lambda: with_log_prob(TABLES["ddpm"]), "noise: this step adds noise"),
    (lambda: log_prob_of(TABLES["ddpm"], 2, X, X, None, X[:1]), "next_sample: expected shape"),
    (
        lambda: log_prob_of(TABLES["ddpm"], 2, X, X, None, X.mT.contiguous().mT),
        "next_sample: expected the sample's layout",
    ),
    (lambda: log_prob_of(TABLES["ddpm"], 2, X, X, None, X.long()), "next_sample: expected float32, bfloat16"),
    (
        lambda: with_log_prob(TABLES["ddpm"], Cursor().start(TABLES["ddpm"]), **NOISE),
        "index: expected an int .* Cursor",
    ),
    (lambda: guided_step(TABLES["ddpm"], 0, X, X, Classifier(), **NOISE, return_log_prob=True), "gradient: expected"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_has_no_log_probability_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_gradients_of_16_bit_samples_are_of_the_mean_before_it_is_rounded():
    """At the last steps sigma is below what bfloat16 has between two numbers."""
    table = fastguide.flow_match_sde(fastguide.FlowSchedule(shift=3.0), 28)
    generator = torch.Generator().manual_seed(0)
    x, prediction = (torch.randn(2, 3, 8, 8, generator=generator).bfloat16() for _ in range(2))
    for index in (0, 26, 27):
        new = fastguide.guided_step(table, index, x, prediction, seeds=torch.tensor([1, 2]))
        grads = []
        for dtype in (torch.bfloat16, torch.float64):
            given = prediction.detach().clone().to(dtype).requires_grad_()
            fastguide.log_prob_of(table, index, x.to(dtype), given, None, new.to(dtype)).sum().backward()
            grads.append(given.grad.double())
        assert (grads[0] - grads[1]).norm() <= 2**-8 * grads[1].norm()


def test_the_ratio_of_a_policy_to_itself_is_1_with_a_learned_variance_too():
    table = fastguide.ddpm(fastguide.NoiseSchedule.linear(), 10, variance_type="learned_range")
    generator = torch.Generator().manual_seed(0)
    x, prediction, variance = (torch.rand(2, 3, 8, 8, generator=generator).bfloat16() for _ in range(3))
    new, log_prob = fastguide.guided_step(
        table, 3, x, prediction, variance=variance, seeds=torch.tensor([1, 2]), return_log_prob="sum"
    )
    given = prediction.clone().requires_grad_()
    later = fastguide.log_prob_of(table, 3, x, given, None, new, variance=variance, reduction="sum")
    assert torch.equal(later.detach(), log_prob)
