"""Comparisons of norms that a pipeline decides by in Python, as Z-Image's: known at once, and traced on."""

from __future__ import annotations

import operator

import pytest
import torch

import fastguide
from fastguide.diffusers import decisions
from fastguide.diffusers import traced as module
from fastguide.diffusers.formula import Formula
from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.lazy_guidance import Taken, resolved
from fastguide.diffusers.traced import Combined, Fusion
from tests.support import family_transformers as transformers
from tests.support.family_pipelines import result
from tests.support.scheduler_pair import fused

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
SHAPE = (4, 1, 16, 12)
GUIDED, ALONE = "fused with guidance", "fused without guidance"


@pytest.fixture(autouse=True)
def _of_small_samples(monkeypatch):
    monkeypatch.setattr(decisions, "LEAST_ELEMENTS", 1)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    neg = torch.randn(SHAPE, generator=generator)
    return (neg + 0.3 * torch.randn(SHAPE, generator=generator)).to(dtype), neg.to(dtype)


def traced(*outputs):
    """Return samples of a list, without a dimension for the batch."""
    fusion = Fusion()
    fusion.begin()
    made = [module.traced(output, fusion) for output in outputs]
    for each in made:
        each.source.alone = True
    return fusion, made


def normalized(pos, neg, most, scale=4.0):
    """Guide as Z-Image's pipeline does."""
    pred = pos + scale * (pos - neg)
    before, after = torch.linalg.vector_norm(pos), torch.linalg.vector_norm(pred)
    if after > before * most:
        pred = pred * (before * most / after)
    return -torch.stack([pred], dim=0).squeeze(2)


def weighed(output):
    sample = torch.zeros(1, 4, 16, 12)
    taken, scale = resolved(output, sample, None)
    assert type(taken) is Taken
    guidance = guidance_of(taken, sample, scale, None, 1.0, "epsilon")
    predictions = [each.double() for each in taken.predictions]
    return fastguide.guided_step(PREDICTION, 0, torch.zeros_like(predictions[0]), predictions, guidance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("most", "kind"), [(0.9, Formula), (5.0, Combined)])
@pytest.mark.parametrize("inference", [False, True])
def test_what_follows_is_fused(most, kind, dtype, inference):
    with torch.inference_mode(inference):
        pos, neg = inputs(dtype)
        exact = normalized(pos.double(), neg.double(), most)
        fusion, given = traced(pos, neg)
        made = normalized(*[each.float() for each in given], most)
        assert type(made) is kind
        torch.testing.assert_close(weighed(made), exact, rtol=2e-6, atol=2e-6)
    assert not fusion.computed
    assert fusion.tries


COMPARED = {
    "a norm and a number": lambda p, n: (torch.linalg.vector_norm(p - n), 8.0),
    "a number and a norm": lambda p, n: (8, (p - n).norm()),
    "inner products": lambda p, n: ((p * n).sum(), (p * p).sum()),
    "roots": lambda p, n: ((p * p).sum().sqrt() * 0.9, n.norm() + 0.5),
    "the least": lambda p, n: (torch.minimum(p.norm(), n.norm()) / 1.1, n.norm() * 0.95),
    "a sum with a multiple": lambda p, n: ((2.0 * p - n).norm() - 1.0, torch.maximum(p.norm(), n.norm())),
    "kept": lambda p, n: (p.norm(keepdim=True), n.norm(keepdim=True)),
}


@pytest.mark.parametrize("function", [operator.gt, operator.ge, operator.lt, operator.le, torch.gt, torch.less_equal])
@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison(name, function):
    for swap in (False, True):
        pos, neg = inputs()
        if function in (torch.gt, torch.less_equal) and name == "a number and a norm":
            continue
        fusion, given = traced(*((neg, pos) if swap else (pos, neg)))
        expected = function(*COMPARED[name](*((neg, pos) if swap else (pos, neg))))
        got = function(*COMPARED[name](*given))
        assert torch.equal(got, expected)
        assert type(got) is torch.Tensor
        assert not fusion.computed


COMPUTED = {
    "a norm that cancels": lambda p, n: (p - n * (p.norm() / n.norm()).item()).norm() > 0.1,
    "not finite": lambda p, n: (p * float("inf")).norm() > 1.0,
    "a deviation": lambda p, n: p.std() > 1.0,
    "a plain sum": lambda p, n: (p.norm() + p.sum()) > 1.0,
    "a tensor": lambda p, n: p.norm() > torch.ones(3),
    "elements": lambda p, n: (p > n).any(),
    "a division by zero": lambda p, n: (p.norm() / (n.norm() * 0.0)) > 1.0,
}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_outputs_of_two_dtypes(dtypes):
    pos, neg = [each.to(dtype) for each, dtype in zip(inputs(), dtypes, strict=True)]

    def decided(pos, neg):
        pred = pos + 4.0 * (pos - neg)
        after, before = torch.linalg.vector_norm(pred), torch.linalg.vector_norm(neg)
        return bool(after > before), bool(after > before * 9.0), bool((pred * neg).sum() > 0.0)

    fusion, given = traced(pos, neg)
    assert decided(*given) == decided(pos, neg)
    assert not fusion.computed


@pytest.mark.parametrize("name", COMPUTED)
def test_other_comparisons_are_computed(name):
    pos, _ = inputs()
    neg = pos * (1.0 + 1e-5 * torch.randn(SHAPE)) if "cancels" in name else inputs()[1]
    fusion, given = traced(pos, neg)
    got, expected = COMPUTED[name](*given), COMPUTED[name](pos, neg)
    assert torch.equal(got, expected)
    assert fusion.computed or name in ("not finite", "elements")  # of an output itself


def test_a_small_sample_is_computed(monkeypatch):
    monkeypatch.setattr(decisions, "LEAST_ELEMENTS", 10**6)
    pos, neg = inputs()
    fusion, given = traced(pos, neg)
    assert torch.equal(normalized(*given, 0.9), normalized(pos, neg, 0.9))
    assert list(fusion.computed) == ["gt"]


def test_what_was_written_to_is_refused():
    pos, neg = inputs()
    _, given = traced(pos, neg)
    norm = (given[0] - given[1]).norm()
    pos.mul_(2.0)
    with pytest.raises(RuntimeError, match="the model's output was written to after"):
        _ = norm > 1.0


def test_a_sample_that_stays_without_a_batch_is_computed():
    pos, neg = inputs()
    _, given = traced(pos, neg)

    def expression(p, n):
        return (p + 2.0 * (p - n)) * (p.norm() / n.norm())

    got, _ = resolved(expression(*given), torch.zeros(SHAPE), None)
    assert torch.equal(got, expression(pos, neg))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("most", "images", "counts"), [(True, 1, GUIDED), (9.0, 1, GUIDED), (True, 2, ALONE)])
def test_z_image(most, images, counts, inference):
    """Several images, each with its own factor, are stacked by the pipeline."""
    pipe, given = transformers.z_image(normalization=most, images=images)
    before = {steps: result(pipe, given, steps) for steps in (4, 3)}
    assert (result(pipe, {**given, "cfg_normalization": False}, 3) - before[3]).abs().max() > 0.02 or most == 9.0
    done = fused.accelerate(pipe)
    with torch.inference_mode(inference):
        for steps, expected in before.items():
            torch.testing.assert_close(result(pipe, given, steps), expected, rtol=2e-4, atol=2e-4)
    assert done.counts == {counts: 7}
