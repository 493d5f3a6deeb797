"""Gradients through weights that are made of moments: as exact as torch's own, and without tensors of their own."""

from __future__ import annotations

import pytest
import torch

import fastguide
from benchmarks.measure import gradient_memory as formulas
from benchmarks.measure.allocations import memory_of
from fastguide import AdaptiveProjected, ClassifierFree, Normalized, Tangential
from fastguide.step import through_moments
from tests.step.test_gradients import BOTH, SCHEDULE

TABLE, CALL = fastguide.ddim(SCHEDULE, 6), 2
SCALE = formulas.SCALE
KINDS = {
    "rescaled": (lambda: ClassifierFree(SCALE, guidance_rescale=0.7), formulas.rescaled),
    "projected": (lambda: AdaptiveProjected(SCALE, norm_threshold=15.0), formulas.projected),
    "tangential": (lambda: Tangential(SCALE), formulas.tangential),
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
        # what the step leaves is rounded, and so is what is added to it
        rounding = 1.5 * torch.finfo(given.dtype).eps * truth.abs().max()
        assert (g.double() - truth).abs().max() <= 2 * (single.double() - truth).abs().max() + rounding


@pytest.mark.parametrize("make", [*(make for make, _ in KINDS.values()), lambda: Normalized(SCALE)])
def test_no_tensor_of_the_step_s_size_is_made(make, generator, monkeypatch):
    """A part of a sample's elements at a time; the gradients are the same as of all at once."""
    x, uncond, cond, came = inputs(generator, (16, 3, 16, 16))
    leaves = [tensor.requires_grad_() for tensor in (x, uncond, cond)]
    guidance = make()

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
