"""Steps of a flow whose tokens have timesteps of their own, beside diffusers' own."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide.diffusers.guided import Guided
from tests.support.counted_loops import model
from tests.support.scheduler_pair import diffusers, fused, pair, randn

NAME, SHAPE = "FlowMatchEulerDiscreteScheduler", (2, 5, 4)


def told(t, places):
    """Return timesteps: those of the step, but no later than some tokens' own."""
    return torch.minimum(t.float(), places)


PLACES = {
    "one for all": torch.tensor([[1000.0]]),
    "one a sample": torch.tensor([[1000.0], [431.0]]),
    "some tokens": torch.tensor([[1000.0, 1000.0, 300.0, 0.0, 77.7], [1000.0, 512.0, 1000.0, 1000.0, 3.0]]),
    "the same of each sample": torch.tensor([[1000.0, 1000.0, 300.0, 0.0, 77.7]]),
}


def loop(scheduler, places, dtype=torch.float32, scale=None, guided=True, return_dict=True, first=None):
    scheduler.set_timesteps(6)
    x, seen = randn(*SHAPE) if first is None else first, []
    for t in scheduler.timesteps:
        timesteps = told(t, places)
        uncond, cond = (model(x.to(dtype), t, value) for value in (0.0, 1.0))
        if scale is not None and guided:
            given, how = torch.cat([uncond, cond]), {"guidance_scale": scale}
        else:
            by = 0.0 if scale is None else torch.as_tensor(scale).reshape(-1, 1, 1)
            given, how = uncond + by * (cond - uncond), {}
        result = scheduler.step(-given, t, x, per_token_timesteps=timesteps, return_dict=return_dict, **how)
        x = result.prev_sample if return_dict else result[0]
        seen.append(x)
    return torch.stack(seen)


@pytest.mark.parametrize("scale", [None, 3.0, torch.tensor([2.0, 4.0])])
@pytest.mark.parametrize("places", PLACES)
def test_steps_are_diffusers(places, scale, monkeypatch):
    ours, theirs = pair(NAME, shift=2.0)
    expected = loop(theirs, PLACES[places], scale=scale, guided=False)
    monkeypatch.setattr(f"diffusers.{NAME}.step", None)
    got = loop(ours, PLACES[places], scale=scale)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert ours.step_index == theirs.step_index == 6
    assert torch.equal(loop(ours, PLACES[places], scale=scale, return_dict=False), got)


def test_a_sample_that_is_packed_as_a_view():
    """Its channels are one after the other, and not its tokens."""
    first = randn(SHAPE[0], SHAPE[2], SHAPE[1]).mT
    got, expected = (loop(each, PLACES["some tokens"], first=first) for each in pair(NAME))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sample_is_in_float32_from_the_first_step_on(dtype):
    first = randn(*SHAPE, dtype=dtype)
    got, expected = (loop(each, PLACES["some tokens"], torch.bfloat16, first=first) for each in pair(NAME))
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_tokens_at_the_end_stay_as_they_are():
    """To the bit, whatever the model says of them."""
    scheduler = getattr(fused, NAME)()
    scheduler.set_timesteps(4)
    x, t = randn(*SHAPE), scheduler.timesteps[1]
    timesteps = told(t, PLACES["some tokens"])
    got = scheduler.step(randn(*SHAPE, seed=1), t, x, per_token_timesteps=timesteps).prev_sample
    assert torch.equal(got[0, 3], x[0, 3])
    assert not torch.equal(got[0, 2], x[0, 2])


REASONS = {
    "noise": ({"stochastic_sampling": True}, {}, "timesteps for each token, with noise"),
    "four dimensions": ({}, {"layout": lambda x: x[:, None]}, "shapes that broadcast, or do not fit"),
    "float64": ({}, {"layout": lambda x: x.double()}, "timesteps for each token, in float64"),
    "whole numbers": ({}, {"timesteps": lambda t: t.to(torch.float16)}, "timesteps for each token that are not as"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_left_to_diffusers(case):
    config, how, reason = REASONS[case]
    results = []
    for scheduler in pair(NAME, **config):
        scheduler.set_timesteps(4)
        scheduler._fusion = fusion = fused.pipelines.Fusion()
        x, t = how.get("layout", lambda x: x)(randn(*SHAPE)), scheduler.timesteps[1]
        timesteps = how.get("timesteps", lambda t: t)(told(t, PLACES["some tokens"]))
        torch.manual_seed(0)
        results.append(scheduler.step(randn(*SHAPE, seed=1), t, x, per_token_timesteps=timesteps).prev_sample)
        if type(scheduler) is getattr(fused, NAME):
            assert [kind.startswith(f"left to diffusers: {reason}") for kind in fusion.counts] == [True]
    assert torch.equal(*results)


def test_weights_that_are_made_of_the_predictions_are_left_to_the_pipeline():
    """They are of whole samples."""
    scheduler = getattr(fused, NAME)()
    scheduler.set_timesteps(4)
    scheduler._fusion = fusion = fused.pipelines.Fusion()
    x, t, (u, c) = randn(*SHAPE), scheduler.timesteps[1], randn(2, *SHAPE, seed=1)
    output = Guided((u, c), fastguide.ZeroStar(3.0), lambda: u + 2 * (c - u))
    got = scheduler.step(output, t, x, per_token_timesteps=told(t, PLACES["some tokens"])).prev_sample
    theirs = getattr(diffusers, NAME)()
    theirs.set_timesteps(4)
    assert torch.equal(
        got, theirs.step(u + 2 * (c - u), t, x, per_token_timesteps=told(t, PLACES["some tokens"])).prev_sample
    )
    assert [kind.endswith("weights that are made of the predictions") for kind in fusion.counts] == [True]


def test_a_whole_number_is_refused_as_diffusers_does():
    for scheduler in pair(NAME):
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(randn(*SHAPE), 3, randn(*SHAPE), per_token_timesteps=torch.full((2, 5), 500.0))


def test_it_begins_where_it_is_told_to():
    scheduler = getattr(fused, NAME)()
    assert isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    for number in (2, 3):
        given = torch.full((2, 5), 500.0)
        scheduler.step(randn(*SHAPE), scheduler.timesteps[number], randn(*SHAPE), per_token_timesteps=given)
    assert scheduler.step_index == 4
