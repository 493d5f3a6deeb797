"""Guidance that a pipeline joins again, along the batch and the channels, is what torch would make of it."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.joined import Doubled, Joined
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.taken import PerFrame, Taken
from fastguide.diffusers.traced import Combined, Fusion
from fastguide.diffusers.traced import traced as traced_for
from tests.support.scheduler_pair import randn

BATCH, CHANNELS, GUIDED = 2, 5, 3


def traced(output):
    fusion = Fusion()
    fusion.tries = True
    return traced_for(output, fusion)


def guided(output, scale=2.0):
    """Return guidance of the first channels of an output whose conditional half is the first, twice; and the rest."""
    eps, rest = output[:, :GUIDED], output[:, GUIDED:]
    cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
    half = uncond + scale * (cond - uncond)
    return torch.cat([half, half], dim=0), rest


def joined(output, scale=2.0):
    return torch.cat(guided(output, scale), dim=1)


def whole(batch=BATCH, channels=CHANNELS):
    return randn(2 * batch, channels, 4, 4, seed=batch)


def step_of(output, sample):
    """Return what a step makes of a lazy output: the guided prediction, by its weights."""
    taken, scale = resolved(output, sample, None, per_frame=True)
    assert type(taken) is Taken
    lead = 1
    if type(scale) is PerFrame:
        scale, lead = scale.scale, scale.lead
    weights = guidance_of(taken, sample, scale, None, 1.0, "epsilon").weights(sample.device, torch.float64)
    flat = [each.flatten(0, lead - 1).double() for each in taken.predictions]
    factors = weights[0].reshape(-1, weights.shape[-1], *[1] * (flat[0].dim() - 1)).unbind(1)[: len(flat)]
    made = factors[0] * flat[0] + sum(w * (each - flat[0]) for w, each in zip(factors[1:], flat[1:], strict=True))
    return made.reshape(sample.shape)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_two_of_each_sample(batch):
    """As DiT's pipeline does."""
    output = whole(batch, 2 * GUIDED)
    made = joined(traced(output))
    assert (type(made), type(made.main)) == (Joined, Doubled)
    model_output, rest = torch.split(made, GUIDED, dim=1)
    expected, others = guided(output)
    assert (model_output.shape, model_output.dtype, len(model_output)) == (expected.shape, expected.dtype, 2 * batch)
    torch.testing.assert_close(step_of(model_output, expected), expected.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(rest.computed(), others)
    assert torch.equal(model_output.computed(), expected)
    assert torch.equal(made.computed(), joined(output))


def test_one_sample_is_not_copied():
    output = whole(1)
    taken, _ = resolved(guided(traced(output))[0], randn(2, GUIDED, 4, 4), None)
    assert {each.untyped_storage().data_ptr() for each in taken.predictions} == {output.untyped_storage().data_ptr()}


def test_without_other_channels_there_is_nothing_to_join():
    output = whole()[:, :GUIDED]
    made = joined(traced(output))
    assert type(made) is Doubled
    assert torch.equal(made.computed(), joined(output))


@pytest.mark.parametrize("change", [lambda x: x, lambda x: -x, torch.neg])
@pytest.mark.parametrize("split", [lambda x: x.chunk(2, dim=0), lambda x: torch.chunk(x, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_channels_that_are_not_guided(change, split, batch):
    """As Lumina's pipeline does, which negates the result as well."""
    output = whole(batch)
    (made, other), (expected, _) = split(joined(traced(output))), split(joined(output))
    made, expected = change(made), change(expected)
    assert (type(made), type(made.main)) == (Joined, Combined)
    got = step_of(made, expected)
    torch.testing.assert_close(got, expected.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, GUIDED:], expected[:, GUIDED:].double(), rtol=0, atol=0)
    assert torch.equal(made.computed(), expected)
    assert torch.equal(other.computed(), split(joined(output))[1])


def test_channels_of_another_output_are_computed():
    """The kernel weighs the channels of one prediction; a sum of several is none of them."""
    output, other = whole(), whole(3)[: 2 * BATCH]
    for rest, theirs in (
        (traced(other)[:, GUIDED:], other[:, GUIDED:]),
        (traced(output)[:, : CHANNELS - GUIDED], output[:, : CHANNELS - GUIDED]),
    ):
        made = torch.cat([guided(traced(output))[0], rest], dim=1).chunk(2)[0]
        expected = torch.cat([guided(output)[0], theirs], dim=1).chunk(2)[0]
        got, scale = resolved(made, expected, None, per_frame=True)
        assert scale is None
        assert torch.equal(got, expected)


@pytest.mark.parametrize("part", [slice(0, 1), slice(3, 4)])
def test_outputs_that_are_written_to_are_refused(part):
    for take in (lambda made: made.chunk(2)[0], lambda made: made.main):
        output = whole()
        made = take(joined(traced(output)))
        output[:, part] = 0.0
        with pytest.raises(RuntimeError, match="the model's output was written to after guidance had been taken from"):
            resolved(made, made.like() if type(made) is Doubled else randn(BATCH, CHANNELS, 4, 4), None)


def test_in_inference_mode_joins_are_computed_before_others_may_write():
    with torch.inference_mode():
        given = whole().clone()
        output = traced(given)
        made, expected = joined(output), joined(given.clone())
        half = made.chunk(2)[0]
        output.mul_(3.0)
        assert torch.equal(made.computed(), expected)
        assert torch.equal(half.computed(), expected.chunk(2)[0])


def test_what_was_joined_and_seen_is_not_taken_apart():
    output = whole()
    made = joined(traced(output))
    made.computed().mul_(2.0)
    assert torch.equal(made.chunk(2)[0], 2 * joined(output).chunk(2)[0])
    twice = guided(traced(output))[0]
    twice.computed().mul_(2.0)
    got, scale = resolved(twice, twice.computed(), None)
    assert scale is None
    assert torch.equal(got, 2 * guided(output)[0])


@pytest.mark.parametrize(
    "by", [lambda h: torch.cat([h, h, h]), lambda h: torch.cat([h, 2.0 * h]), lambda h: h.repeat(2, 1, 1, 1)]
)
def test_other_joins_are_computed(by):
    output = whole()

    def half(of):
        cond, uncond = of.chunk(2)
        return uncond + 2.0 * (cond - uncond)

    assert torch.equal(by(half(traced(output))), by(half(output)))


# ---- Outputs that are joined ----


def of_two_outputs(first, second, also):
    """Return guidance of what a model says of pictures and texts, in one tensor, as UniDiffuser's pipeline does."""
    cond, uncond = (torch.concat([a.reshape(2, -1), *also, b.reshape(2, -1)], dim=-1) for a, b in (first, second))
    return 3.0 * cond + (1.0 - 3.0) * uncond


@pytest.mark.parametrize("inference", [False, True])
def test_outputs_that_are_joined_are_an_output(inference):
    with torch.inference_mode(inference):
        given = [(randn(2, 3, 4, 4, seed=k).clone(), randn(2, 5, seed=9 + k).clone()) for k in (1, 2)]
        fusion = Fusion()
        made = of_two_outputs(*[[traced_for(each, fusion) for each in pair] for pair in given], ())
        assert type(made) is Combined
        expected = of_two_outputs(*given, ())
        torch.testing.assert_close(step_of(made, torch.zeros(expected.shape)).float(), expected)
        given[0][0].mul_(2.0)  # of which the pipeline has a copy
        assert torch.equal(made.computed(), expected)


@pytest.mark.parametrize("what", ["a tensor", "another pipeline's", "a sum", "an integer"])
def test_outputs_that_are_joined_with_something_else_are_computed(what):
    given = [(randn(2, 3, 4, 4, seed=k), randn(2, 5, seed=9 + k)) for k in (1, 2)]
    also = torch.ones(2, 4, dtype=torch.int64 if what == "an integer" else torch.float32)
    fusion = Fusion()
    first, second = ([traced_for(each, fusion) for each in pair] for pair in given)
    lazy = {
        "a tensor": also, "another pipeline's": traced_for(also, Fusion()), "an integer": traced_for(also, fusion),
        "a sum": 2.0 * traced_for(also, fusion) / 2.0,
    }[what]  # fmt: skip
    made = of_two_outputs(first, second, (lazy,))
    assert type(made) is torch.Tensor
    assert torch.equal(made, of_two_outputs(*given, (also,)))
