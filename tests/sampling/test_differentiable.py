"""Runs that autograd follows, and runs with log-probabilities: the sampler's own samples, gradients and ratios."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import fastguide
from benchmarks.measure.allocations import memory_of
from fastguide import AdaptiveProjected, Classifier, ClassifierFree, History, Sampler, log_prob_of
from tests.support.loop_cases import (
    ALL_CASES,
    COND,
    DDIM,
    DDPM,
    DPM,
    FREE,
    SCHEDULE,
    UNCOND,
    Model,
    with_generator,
    x_T,
)

SDE = fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++")
FLOW_SDE = fastguide.flow_match_sde(fastguide.FlowSchedule(), 6)
WITH_CLASSIFIERS = {"a classifier", "both", "an interval, and a classifier"}
WITHOUT_CLASSIFIER = [name for name in ALL_CASES if name not in WITH_CLASSIFIERS]


@pytest.mark.parametrize("name", WITHOUT_CLASSIFIER)
def test_samples_are_the_sampler_s_own(name):
    make, options = ALL_CASES[name]
    dtype = torch.float64 if name == "double precision" else torch.float32
    x = x_T().to(dtype)
    expected = make()(x, **with_generator(options))
    got = make().differentiable(x, **with_generator(options))
    assert got.requires_grad
    assert torch.equal(got, expected)


def test_a_checkpoint_keeps_a_sample_and_an_entry_of_the_history_for_each_call():
    """Not all slots for each, and none where a call writes none."""
    table, x = fastguide.unipc(SCHEDULE, 8, solver_order=3), torch.randn(4, 3, 64, 64).requires_grad_()
    sampler = Sampler(lambda x, t: 0.1 * x, table)
    written = int((table.coefficients()["hist_slot"] >= 0).sum())
    assert table.history_slots == 3
    assert written < len(table)
    used = memory_of(lambda: (sampler.differentiable(x),), [x], [torch.randn(x.shape)])
    tensors = len(table) - 1 + table.history_slots + written  # the first sample is the caller's
    state = torch.get_rng_state().nbytes  # which torch keeps for each
    assert used.kept <= tensors * x.nbytes + len(table) * state + 4096
    used = memory_of(lambda: (sampler.differentiable(x, checkpoint=False),), [x], [torch.randn(x.shape)])
    assert used.kept < 4096


def parameters(model):
    return list(model.convolution.parameters())


def gradients(sampler, x, *others, **options):
    weigh = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    inputs = [*parameters(sampler.model), *others]
    return torch.autograd.grad((weigh * sampler.differentiable(x, **options)).sum(), inputs)


@pytest.mark.parametrize("table", [DDIM, DDPM, DPM, SDE], ids=lambda table: table.name)
def test_gradients_are_those_of_a_loop_by_hand(table):
    """In float64, by the reference, recorded by torch operation by operation; conditions and x_T get theirs too."""
    model, guidance = Model(dtype=torch.float64), ClassifierFree(2.0)
    x, cond = x_T().double().requires_grad_(), COND.double().requires_grad_()
    options = {"cond": cond, "uncond": UNCOND.double(), "seeds": [1, 2, 3]}

    def by_hand():
        sample, seeds = x, torch.tensor([1, 2, 3])
        row = [{name: v[k] for name, v in table.coefficients().items()} for k in range(len(table))]
        slots = [torch.zeros_like(x) for _ in range(table.history_slots)]
        for k, c in enumerate(row):
            t = table.timesteps[k].expand(3)
            uncond = model(sample, t, options["uncond"])
            m = uncond + 2.0 * (model(sample, t, cond) - uncond)
            x0 = (c["x0_scale"] * (c["x0_sample"] * sample + c["x0_pred"] * m)).clamp(-c["clip"], c["clip"])
            z = fastguide.portable_noise(seeds, x.shape, step=k).double()
            new = c["out_x0"] * x0 + (c["out_sample"] + c["out_anchor"]) * sample + c["out_pred"] * m
            new = new + c["out_noise"] * z + sum(c[f"out_hist_{s}"] * entry for s, entry in enumerate(slots))
            if c["hist_slot"] >= 0:
                slots[int(c["hist_slot"])] = c["hist_x0"] * x0 + c["hist_sample"] * sample
            sample = new
        return sample

    inputs = [*parameters(model), x, cond]
    weigh = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    expected = torch.autograd.grad((weigh * by_hand()).sum(), inputs)
    sampler = Sampler(model, table, guidance)
    for checkpoint in (False, True):
        got = gradients(sampler, x, x, cond, checkpoint=checkpoint, **options)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 1, 3, 2), (0, 3, 2, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_checkpoint_keeps_the_layout(batch, order):
    """Of a sample whose dimensions lie in another order, as those of channels_last do, with several slots."""
    factor = torch.tensor(0.3, requires_grad=True)
    sampler = Sampler(lambda x, t: factor * x.tanh(), fastguide.unipc(SCHEDULE, 5))
    x = torch.randn(batch, 3, 4, 5).permute(order).contiguous().permute([order.index(k) for k in range(4)])
    assert sampler.table.history_slots > 1
    made = [sampler.differentiable(x, checkpoint=checkpoint) for checkpoint in (True, False)]
    assert torch.equal(*made)
    torch.testing.assert_close(*[torch.autograd.grad(sample.sum(), factor)[0] for sample in made])


@pytest.mark.parametrize("table", [DDIM, SDE], ids=lambda table: table.name)
def test_the_last_steps_alone(table):
    """The calls before them are as constants; a checkpoint calls the model once more, for these alone."""
    model = Model()
    sampler, x = Sampler(model, table, ClassifierFree(2.0)), x_T()
    options = {**FREE, "seeds": [1, 2, 3]}
    model.called = 0
    got = gradients(sampler, x, last=2, **options)
    assert model.called == 6 + 2
    model.called = 0
    kept = gradients(sampler, x, last=2, checkpoint=False, **options)
    assert model.called == 6
    whole = gradients(sampler, x, **options)
    begin = sampler.trajectory(x, **options).samples[4]
    if not table.history_slots:
        by_hand = begin
        for call in (4, 5):
            both = model(torch.cat([by_hand] * 2), table.timesteps[call].expand(6), torch.cat([UNCOND, COND]))
            by_hand = fastguide.guided_step(table, call, by_hand, both, ClassifierFree(2.0))
        weigh = torch.linspace(-1, 1, x.numel()).view(x.shape)
        for ours, theirs in zip(got, torch.autograd.grad((weigh * by_hand).sum(), parameters(model)), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs, all_of_them in zip(got, kept, whole, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, all_of_them)


@pytest.mark.parametrize("make", [ClassifierFree, lambda scale: AdaptiveProjected(scale, norm_threshold=2.0)])
def test_a_scale_is_learned(make):
    """Against differences, through weights that are constants and such that are made of moments."""

    def loss(scale):
        return Sampler(Model(), DDIM, make(scale)).differentiable(x_T(), **FREE).double().square().sum()

    scale = torch.tensor(3.0, requires_grad=True)
    (got,) = torch.autograd.grad(loss(scale), [scale])
    expected = (loss(3.01) - loss(2.99)).detach() / 0.02
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=1e-3)


def test_parts_that_are_left_out_are_left_out_here_too():
    guidance = ClassifierFree.per_step([1, 1, 4, 4, 1, 1])
    model = Model()
    sampler = Sampler(model, DDIM, guidance, skip_unconditional=True, batched=False)
    sampler.differentiable(x_T(), checkpoint=False, **FREE)
    assert model.called == 4 + 2 * 2


# ---- Log-probabilities ----


@pytest.mark.parametrize("table", [DDPM, FLOW_SDE, SDE], ids=lambda table: table.name)
@pytest.mark.parametrize("reduction", [True, "sum"])
def test_a_trajectory_with_log_probabilities(table, reduction):
    """Its samples are the sampler's; the model's predictions on them say the same probabilities, to the bit."""
    model, x, options = Model(), x_T(), {**FREE, "seeds": [1, 2, 3]}
    sampler = Sampler(model, table, ClassifierFree(2.0), timestep_dtype=torch.float32)
    way = sampler.trajectory(x, log_prob=reduction, **options)
    plain = sampler.trajectory(x, **options)
    assert torch.equal(way.samples, plain.samples)
    assert torch.equal(way.originals, plain.originals)
    assert torch.equal(way.sample, plain.sample)
    assert not way.log_probs.requires_grad
    history = History(table, x)
    for call, adds in enumerate(table.adds_noise):
        t, given = table.timesteps[call].float().expand(6), way.samples[call]
        both = model(torch.cat([table.in_scales[call] * given] * 2), t, torch.cat([UNCOND, COND]))
        if not adds:
            assert torch.equal(way.log_probs[call], torch.zeros(3, dtype=torch.float64))
            continue
        again = log_prob_of(
            table, call, given, both, ClassifierFree(2.0), way.samples[call + 1], history=history,
            reduction="mean" if reduction is True else reduction,
        )  # fmt: skip
        assert again.requires_grad
        assert torch.equal(again, way.log_probs[call])


def test_without_the_way_and_with_a_classifier():
    make, options = ALL_CASES["both"]
    way = make().trajectory(x_T(), samples=False, originals=False, log_prob=True, **options)
    assert way.samples is None
    assert way.originals is None
    assert torch.equal(way.sample, make()(x_T(), **options))


SAMPLER = Sampler(Model(), DDIM, ClassifierFree(2.0))
LEARNING = Sampler(Model(), DDIM, ClassifierFree(torch.tensor(2.0, requires_grad=True)))
WITH_CLASSIFIER = Sampler(Model(), DDIM, Classifier(grad_fn=lambda x, t: -x))
LEAF = x_T().requires_grad_()
REFUSED = [
    (lambda: SAMPLER(LEAF, **FREE), "x_T: gradients asked of a captured loop"),
    (lambda: SAMPLER.trajectory(LEAF, **FREE), "x_T: gradients asked of a captured loop"),
    (lambda: LEARNING(x_T(), **FREE), "guidance: gradients asked of a captured loop"),
    (lambda: SAMPLER.differentiable(x_T(), last=7, **FREE), "last: expected at most the run's 6 calls, got 7"),
    (lambda: SAMPLER.differentiable(x_T(), last=0, **FREE), "last: expected"),
    (lambda: SAMPLER.differentiable(x_T(), checkpoint=1, **FREE), "checkpoint: expected True or False, got 1"),
    (lambda: WITH_CLASSIFIER.differentiable(x_T()), "guidance: expected no Classifier"),
    (lambda: SAMPLER.trajectory(x_T(), log_prob=True, **FREE), "got ddim; its stochastic form is ddim"),
    (lambda: SAMPLER.trajectory(x_T(), log_prob="most", **FREE), "expected 'mean' or 'sum', got 'most'"),
    (lambda: SAMPLER.trajectory(x_T(), log_prob=True, progress=True, **FREE), "progress: expected none with log_prob"),
    (lambda: SAMPLER.trajectory(x_T(), log_prob=True, mask=torch.ones(4), **FREE), "mask: expected none with log_prob"),
    (lambda: SAMPLER.trajectory(x_T(), log_prob=True, mask=torch.zeros(1), **FREE), "mask: expected none with log_"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_records_nothing_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_without_gradients_the_sampler_takes_anything():
    with torch.no_grad():
        assert torch.equal(SAMPLER(LEAF, **FREE), LEARNING(x_T(), **FREE))


@pytest.mark.parametrize("call", [SAMPLER, SAMPLER.differentiable, SAMPLER.trajectory], ids=["call", "run", "way"])
def test_other_derivatives_than_autograd_s_are_refused(call):
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(x_T(), x_T())
        cond = forward_ad.make_dual(FREE["cond"], torch.ones_like(FREE["cond"]))
        for arguments in ({"x_T": moving, **FREE}, {"x_T": x_T(), **FREE, "cond": cond}):
            with pytest.raises(NotImplementedError, match="Sampler: expected no tangents"):
                call(**arguments)
    with pytest.raises(NotImplementedError, match=r"Sampler: expected no tensors of torch\.func"):
        torch.func.vmap(lambda x: call(x, **FREE))(x_T()[None])
