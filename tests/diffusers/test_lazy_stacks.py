"""Guidance of one sample after the other, as Z-Image's, whose model returns a list: it is stacked, and fused."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastguide
from fastguide.diffusers import traced as module
from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.taken import Taken
from fastguide.diffusers.traced import Combined, Fusion

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
SHAPE = (4, 1, 6, 5)


def outputs(count=3, dtype=torch.float32):
    """Return as many conditional samples, and then as many unconditional ones."""
    return [each.to(dtype) for each in torch.randn(2 * count, *SHAPE, dtype=torch.float64)]


def traced(samples):
    fusion = Fusion()
    return [module.traced(each, fusion) for each in samples]


def guided(samples, scale=2.0):
    """Guide as diffusers' ZImagePipeline does."""
    made, count = [], len(samples) // 2
    for j in range(count):
        pos, neg = samples[j], samples[count + j]
        if pos.dtype != torch.float64:
            pos, neg = pos.float(), neg.float()
        made.append(pos + scale * (pos - neg))
    return -torch.stack(made, dim=0).squeeze(2)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_guides_what_a_pipeline_guided_one_by_one(count, dtype):
    """At most twice as far from float64 as the pipeline's own; and by themselves, the values are those."""
    given = outputs(count, dtype)
    expected, own = guided([each.double() for each in given]), guided(given)
    made = guided(traced(given))
    assert type(made) is Combined
    assert (made.shape, made.dtype, made.device) == (own.shape, own.dtype, own.device)
    sample = torch.zeros(own.shape)
    taken, weights = resolved(made, sample, None)
    guidance = guidance_of(taken, sample, weights, None, 1.0, "epsilon")
    got = fastguide.guided_step(PREDICTION, 0, sample, list(taken.predictions), guidance)
    assert len(taken.predictions) == 2
    assert all(each.dtype is dtype for each in taken.predictions)
    assert error(got, expected) <= 2 * error(own, expected) + 1e-8
    assert torch.equal(made.value(), own)


def test_outputs_are_stacked_without_guidance():
    given = outputs()
    made = -torch.stack(traced(given)).squeeze(2)
    taken, weights = resolved(made, torch.zeros(made.shape), None)
    assert weights.constants == (-1.0,)
    assert torch.equal(taken.predictions[0], torch.stack(given).squeeze(2))


def one_of_another_step(samples):
    if not isinstance(samples[1], torch.Tensor):
        samples[1].source.step += 1
    return torch.stack(samples[:2])


def one_of_another_pipeline(samples):
    if not isinstance(samples[1], torch.Tensor):
        samples[1].source.fusion = Fusion()
    return torch.stack(samples[:2])


STACKED = {
    "another number of terms": lambda s: torch.stack([s[0] - s[3], s[1] - s[4] + s[2]]),
    "other coefficients": lambda s: torch.stack([s[0] - s[3], s[1] - 2.0 * s[4]]),
    "a scale of one": lambda s: torch.stack([s[0] - s[3], (s[1] - s[4]) * torch.ones(4, 1, 1, 1)]),
    "scales": lambda s: torch.stack([each * torch.full((4, 1, 1, 1), 0.5) for each in s[:2]]),
    "another dtype": lambda s: torch.stack([s[0] - s[3], (s[1] - s[4]).double()]),
    "an output in another dtype": lambda s: torch.stack([s[0], s[1].double()]),
    "a tensor": lambda s: torch.stack([s[0] - s[3], torch.ones(SHAPE)]),
    "a norm": lambda s: torch.stack([s[0] / s[0].std((1, 2, 3), keepdim=True), s[1]]),
    "one of another step": one_of_another_step,
    "one of another pipeline": one_of_another_pipeline,
}


@pytest.mark.parametrize("name", STACKED)
def test_what_is_not_alike_is_computed(name):
    given = outputs()
    made = STACKED[name](traced(given))
    assert type(made) is torch.Tensor
    assert torch.equal(made, STACKED[name](given))


@pytest.mark.parametrize("dim", [1, -1])
def test_another_dimension_is_a_sum_as_well(dim):
    given = outputs()

    def formula(samples):
        return torch.stack([samples[j] - 0.5 * samples[j + 3] for j in range(3)], dim=dim)

    made = formula(traced(given))
    assert type(made) is Combined
    assert made.shape == formula(given).shape
    taken, _ = resolved(made, torch.zeros(made.shape), None)
    assert torch.equal(taken.predictions[1], torch.stack(given[3:], dim))


def test_inference_mode():
    with torch.inference_mode():
        given = outputs()
        made = guided(traced(given))
        taken, weights = resolved(made, torch.zeros(made.shape), None)
        assert weights is not None
        assert torch.equal(taken.predictions[0], torch.stack(given[:3]).squeeze(2))
        assert torch.equal(made.value(), guided(given))


WRITTEN = {
    "samples": guided,
    "of bfloat16": guided,
    "outputs alone": lambda s: torch.stack(s[:3]),
    "parts of outputs": lambda s: guided([each[1:] for each in s]),
    "pieces, cut anew": lambda s: torch.stack([e.chunk(2)[1] + 2.0 * (e.chunk(2)[1] - e.chunk(2)[0]) for e in s]),
    "one sample twice": lambda s: torch.stack([s[0] - s[1], s[0] - s[1]]),
    "two of one output": lambda s: torch.stack([s[0] - s[1], s[0] - s[2]]),
    "in another dimension": lambda s: torch.stack([s[0] - s[1], s[0] - s[2]], -2),
    "a stack of stacks": lambda s: torch.stack([torch.stack([s[0], s[1]]), torch.stack([s[2], s[1]])]),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_stack_is_a_copy(name, inference):
    """As torch's: the model may write its next outputs to the memory of these."""
    with torch.inference_mode() if inference else contextlib.nullcontext():
        given = outputs(dtype=torch.bfloat16 if name == "of bfloat16" else torch.float32)
        expected = WRITTEN[name]([each.clone() for each in given])
        lazy = traced(given)
        made = WRITTEN[name](lazy)
        weighed = WRITTEN[name](lazy)
        assert type(made) is Combined
        for each in lazy:
            each.zero_()
        assert torch.equal(made.value(), expected)
        taken, weights = resolved(weighed, torch.zeros(expected.shape), None)
        if isinstance(taken, Taken):
            guidance = guidance_of(taken, torch.zeros(expected.shape), weights, None, 1.0, "epsilon")
            predictions = [each.float() for each in taken.predictions]
            taken = fastguide.guided_step(PREDICTION, 0, torch.zeros(expected.shape), predictions, guidance)
        rounding = torch.finfo(expected.dtype).eps
        assert error(taken, expected.double()) <= 4 * rounding


@pytest.mark.parametrize("when", ["before the stack", "a view of guidance"])
def test_what_no_copy_has_is_refused(when):
    """Guidance whose output was written to before it was stacked; and a view of guidance, whose output is elsewhere."""
    given = outputs()
    lazy = traced(given)
    each = [lazy[j] + 2.0 * (lazy[j] - lazy[3 + j]) for j in range(2)]
    if when == "before the stack":
        given[4].mul_(2.0)
    made = torch.stack([one[:, 0] for one in each] if when == "a view of guidance" else each)
    given[4].mul_(2.0)
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        resolved(made, torch.zeros(made.shape), None)
