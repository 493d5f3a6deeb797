"""Gradients through weights that are made of moments: as exact as torch's own, and without tensors of their own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import fastguide
from benchmarks.measure import gradient_memory as formulas
from benchmarks.measure.allocations import memory_of
from fastguide import AdaptiveProjected, Classifier, ClassifierFree, History, Normalized, Tangential, as_guidance
from fastguide.step import through_moments
from tests.step.test_gradients import BOTH, SCHEDULE

TABLE, CALL = fastguide.ddim(SCHEDULE, 6), 2
SCALE = formulas.SCALE
KINDS = {
    "rescaled": (lambda: ClassifierFree(SCALE, guidance_rescale=0.7), formulas.rescaled),
    "projected": (lambda: AdaptiveProjected(SCALE, norm_threshold=15.0), formulas.projected),
    "tangential": (lambda: Tangential(SCALE), formulas.tangential),
    "normalized": (lambda: Normalized(SCALE, dim=1), formulas.normalized),
}


def inputs(generator, shape, dtype=torch.float32, apart=0.5):
    """A sample, predictions that nearly agree, and a gradient that comes."""
    x, uncond, shift, came = (torch.randn(shape, generator=generator) for _ in range(4))
    return x, uncond.to(dtype), (uncond + apart * shift).to(dtype), came


def gradients(run, tensors, came):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(run(*leaves), leaves, came)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("predicted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_as_exact_as_torch_s_own(name, predicted, backend, generator):
    """Against the same formula in float64: twice the error that it has in float32, and the rounding of the result."""
    make, formula = KINDS[name]
    *tensors, came = inputs(generator, (3, 3, 25, 24), predicted)
    row = formulas.row_of(TABLE, CALL)

    def plain(dtype):
        def run(x, uncond, cond):
            return formulas.stepped(row, x, formula(uncond, cond))[0]

        return gradients(run, [t.to(dtype) for t in tensors], came.to(dtype))

    def ours(x, uncond, cond):
        return fastguide.guided_step(TABLE, CALL, x, [uncond, cond], make(), backend=backend)

    got = gradients(ours, tensors, came)
    for g, given, single, truth in zip(got, tensors, plain(torch.float32), plain(torch.float64), strict=True):
        assert g.dtype == given.dtype
        rounding = 1.5 * torch.finfo(torch.float32).eps * truth.abs().max()
        if given.dtype == torch.bfloat16:
            rounding = 0.5 * torch.finfo(given.dtype).eps * truth.abs().max()
        assert (g.double() - truth).abs().max() <= 2 * (single.double() - truth).abs().max() + rounding


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("at_once", [2**18, 1])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("state", "predicted"), [("float32", "bfloat16"), ("float64", "float32")])
def test_sums_are_rounded_once(state, predicted, name, at_once, backend, generator, monkeypatch):
    """What comes through the step and through the weights: to the digits of the exact sum, in nearly all elements."""
    monkeypatch.setitem(through_moments._AT_ONCE, "cpu", at_once)
    state, predicted = getattr(torch, state), getattr(torch, predicted)
    x, uncond, cond, came = inputs(generator, (3, 3, 25, 24))
    tensors = [x.to(state), uncond.to(predicted), cond.to(predicted)]
    row, (make, formula) = formulas.row_of(TABLE, CALL), KINDS[name]

    def ours(x, uncond, cond):
        return fastguide.guided_step(TABLE, CALL, x, [uncond, cond], make(), backend=backend)

    def plain(x, uncond, cond):
        return formulas.stepped(row, x, formula(uncond, cond))[0]

    exact = gradients(plain, [t.double() for t in tensors], came.double())
    for got, truth in zip(gradients(ours, tensors, came.to(state))[1:], exact[1:], strict=True):
        assert (got != truth.to(predicted)).double().mean() < 2e-3


@as_guidance(predictions=2)
def of_the_sample(v, scale):
    """Moments of the sample, and a weight of it."""
    uncond, cond = v.predictions
    return (
        cond
        + scale * (cond - uncond) / v.norm(cond - uncond)
        + 0.3 * v.dot(cond, v.sample) / v.norm(v.sample) * v.sample
    )


ROWS = {
    "with a history": fastguide.dpm_solver(SCHEDULE, 6, solver_order=3),
    "clipped": fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0),
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", ROWS)
def test_sums_of_all_that_a_step_has(name, backend, generator, monkeypatch):
    """At rows of their own, beside a classifier, and of moments of the sample: the same for each sample alone."""
    table, index = ROWS[name], torch.tensor([2, 4, 3])
    guidance, slots = of_the_sample([2.0, 3.0, 4.0]) + Classifier(None, 0.7), table.history_slots
    x, uncond, cond, came = (tensor.bfloat16() for tensor in inputs(generator, (3, 4, 7, 6)))
    g, (entries, left) = x.flip(0), torch.randn(2, 3 * slots, *x.shape[1:], generator=generator)

    def run(x, uncond, cond, g, entries):
        history = History(table, x.detach()) if slots else None
        if history is not None:
            history.entries = entries
        y = fastguide.guided_step(
            table, index, x, [uncond, cond], guidance, gradient=g, history=history, backend=backend
        )
        return (y, history.entries) if slots else (y,)

    def gradients_of(dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, uncond, cond, g)]
        leaves.append(entries.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        grads = [came.to(dtype), left.to(leaves[-1].dtype)][: 1 + bool(slots)]
        return torch.autograd.grad(run(*leaves), leaves, grads, allow_unused=not slots)

    whole, exact = gradients_of(torch.bfloat16), gradients_of(torch.float64)
    monkeypatch.setitem(through_moments._AT_ONCE, "cpu", 1)
    for number, (got, again, truth) in enumerate(zip(whole[:4], gradients_of(torch.bfloat16), exact, strict=False)):
        assert torch.equal(got, again)
        if number or backend == "native":  # the reference's program is no part of its step, which rounds the sample's
            assert (got != truth.bfloat16()).double().mean() < 5e-3


@pytest.mark.parametrize("name", [name for name in KINDS if name != "normalized"])
def test_no_tensor_of_the_step_s_size_is_made(name, generator, monkeypatch):
    """A part of a sample's elements at a time; the gradients are the same as of all at once."""
    x, uncond, cond, came = inputs(generator, (16, 3, 16, 16))
    leaves = [tensor.requires_grad_() for tensor in (x, uncond, cond)]
    guidance = KINDS[name][0]()

    def forward():
        return (fastguide.guided_step(TABLE, CALL, x, [uncond, cond], guidance),)

    whole = torch.autograd.grad(forward(), leaves, came)
    monkeypatch.setitem(through_moments._AT_ONCE, "cpu", x[0].numel())
    used = memory_of(forward, leaves, [came])
    assert used.kept < 4096  # some numbers for each sample
    assert used.own < 4 * x[0].nbytes
    assert used.peak < 4.3 * x.nbytes
    for part, expected in zip(torch.autograd.grad(forward(), leaves, came), whole, strict=True):
        assert torch.equal(part, expected)


def test_a_scale_alone_is_learned_without_the_predictions_gradients(generator):
    *tensors, came = inputs(generator, (4, 3, 32, 32))
    scale = torch.tensor(3.0, requires_grad=True)

    def forward():
        return (fastguide.guided_step(TABLE, CALL, tensors[0], tensors[1:], AdaptiveProjected(scale)),)

    used = memory_of(forward, [scale], [came])
    assert used.peak < 3.5 * came.nbytes  # the next sample, and what the moments need


@pytest.mark.parametrize("samples", [8, 1])
def test_groups_are_looked_at_some_samples_at_a_time(samples, generator, monkeypatch):
    """With scales of each step, and of each sample or all, at rows of their own; a classifier's is learned as well."""
    x, uncond, cond, came = inputs(generator, (8, 3, 8, 8))
    g, index = torch.randn(x.shape, generator=generator), torch.tensor([2, 3, 1, 0, 2, 2, 4, 1])
    scale = (3 + torch.rand(6, samples, generator=generator)).requires_grad_()
    of_classifier = torch.rand(8, generator=generator).requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in (x, uncond, cond)]

    def forward():
        guidance = Normalized(scale, dim=1) + Classifier(None, of_classifier)
        return (fastguide.guided_step(TABLE, index, x, [uncond, cond], guidance, gradient=g),)

    expected = torch.autograd.grad(forward(), [*leaves, scale, of_classifier], came)
    whole = memory_of(forward, leaves, [came])
    monkeypatch.setitem(through_moments._AT_ONCE, "cpu", 1)
    for ours, theirs in zip(
        torch.autograd.grad(forward(), [*leaves, scale, of_classifier], came), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert not expected[3][5].any()  # no sample is there
    parts = memory_of(forward, leaves, [came])
    assert parts.own < whole.own / 2


def test_weights_of_groups_are_the_last_ones(generator, monkeypatch):
    """Of all samples, and in the memory of the last step's."""
    x, uncond, cond, _ = inputs(generator, (4, 3, 8, 8))
    guidance, plain = Normalized(SCALE, dim=1), Normalized(SCALE, dim=1)
    fastguide.guided_step(TABLE, CALL, x, [uncond, cond], plain)
    monkeypatch.setitem(through_moments._AT_ONCE, "cpu", 1)
    fastguide.guided_step(TABLE, CALL, x, [cond, uncond.requires_grad_()], guidance)
    place = guidance.last_weights.data_ptr()
    fastguide.guided_step(TABLE, CALL, x, [uncond, cond], guidance)
    assert guidance.last_weights.data_ptr() == place
    torch.testing.assert_close(guidance.last_weights, plain.last_weights)


def test_groups_of_no_sample_pass_empty_gradients_on():
    x, uncond, cond = (torch.randn(0, 3, 4, 4).requires_grad_() for _ in range(3))
    scale = torch.tensor(3.0, requires_grad=True)
    sample = fastguide.guided_step(TABLE, CALL, x, [uncond, cond], AdaptiveProjected(scale, norm_dim=1))
    *empty, of_scale = torch.autograd.grad(sample.sum(), [x, uncond, cond, scale])
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 3, 4, 4)] * 3
    assert of_scale == 0


def test_groups_pass_gradients_on_at_rows_of_their_own(generator):
    x, uncond, cond, _ = (t.double() for t in inputs(generator, (2, 3, 2, 2)))
    scale, index = 2 + torch.rand(6, 2, dtype=torch.float64, generator=generator), torch.tensor([4, 2])

    def run(x, scale, stacked):
        return fastguide.guided_step(TABLE, index, x, stacked, Normalized(scale, dim=1))

    leaves = [tensor.requires_grad_() for tensor in (x, scale, torch.cat([uncond, cond]))]
    assert gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", KINDS)
def test_batches_without_samples(name, backend):
    x, *predictions = (torch.zeros(0, 3, 8, 8, requires_grad=True) for _ in range(3))
    out = fastguide.guided_step(TABLE, CALL, x, predictions, KINDS[name][0](), backend=backend)
    assert [g.shape for g in torch.autograd.grad(out.sum(), [x, *predictions])] == [x.shape] * 3
