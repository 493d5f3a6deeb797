"""Schedulers of flows whose steps go by the timestep, or end where the last timestep is, beside diffusers' own."""

from __future__ import annotations

import pytest
import torch

from tests.support.counted_loops import largest_error, model
from tests.support.scheduler_pair import SHAPE, fused, pair, randn

# ---- A flow map: from any timestep to any other ----

MAP = "FlowMapEulerDiscreteScheduler"


def map_steps(scheduler, between):
    """Return the samples of steps, each between two timesteps that a function of the scheduler's own names."""
    scheduler.set_timesteps(6)
    x, seen = randn(*SHAPE), []
    for t, r in between(scheduler.timesteps):
        x = scheduler.step(model(x, t, 1.0), t, x, r).prev_sample
        seen.append((x, None))
    return seen, scheduler.step_index


def in_order(t):
    return [(each, None) for each in t]


def to_the_next_by_name(t):
    return list(zip(t, [*t[1:], 0.0], strict=True))


def by_numbers(t):
    return list(zip(t.tolist(), [*t[1:].tolist(), torch.tensor(0)], strict=True))


def again_and_back(t):
    return [(t[0], None), (t[0], None), (t[3], None), (t[1], None), (t[5], None), (t[5], None), (t[0], None)]


@pytest.mark.parametrize("between", [in_order, to_the_next_by_name, by_numbers, again_and_back])
def test_a_flow_map_steps_from_the_timestep_that_it_is_given(between, monkeypatch):
    ours, theirs = pair(MAP, shift=2.0)
    expected, counted = map_steps(theirs, between)
    monkeypatch.setattr(f"diffusers.{MAP}.step", None)
    got, count = map_steps(ours, between)
    assert largest_error(got, expected) < 2e-6
    assert count == counted


def skipping(t):
    return [(t[0], t[2]), (t[2], t[4]), (t[4], 0.0)]


def elsewhere(t):
    return [(t[0], None), (t[1], 300.0), (300.0, 120.0), (120.0, t[5])]


def nowhere(t):
    return [(t[2], t[2]), (t[1], 5e-4), (t[5], t[5] + 5e-4)]


@pytest.mark.parametrize("between", [skipping, elsewhere, nowhere])
def test_a_flow_map_s_other_steps_are_left_to_diffusers(between):
    ours, theirs = pair(MAP, shift=2.0)
    (got, count), (expected, counted) = map_steps(ours, between), map_steps(theirs, between)
    assert largest_error(got, expected) < 2e-6
    assert count == counted


def test_sigmas_of_a_flow_map_that_come_twice(monkeypatch):
    ours, theirs = pair(MAP)
    results = []
    for scheduler in (theirs, ours):
        if scheduler is ours:
            monkeypatch.setattr(f"diffusers.{MAP}.step", None)
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.7, 0.2])
        x, seen = randn(*SHAPE), []
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, 1.0), t, x, return_dict=False)[0]
            seen.append((x, None))
        results.append(seen)
    assert largest_error(*results) < 2e-6
    assert torch.equal(results[1][1][0], results[1][2][0])  # diffusers finds the first of the two


def test_a_flow_map_s_step_to_0_from_near_it_is_none():
    """As diffusers takes 0 for the timestep next to it."""
    results = []
    for scheduler in pair(MAP):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 5e-7])
        t = scheduler.timesteps[2]
        results.append([(scheduler.step(1e6 * randn(*SHAPE, seed=1), t, randn(*SHAPE), 0.0).prev_sample, None)])
    assert largest_error(*results) < 2e-6


def test_a_flow_map_that_refuses_leaves_its_counter():
    scheduler = getattr(fused, MAP)()
    scheduler.set_timesteps(4)
    x = scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE)).prev_sample
    with pytest.raises(ValueError, match="model_output: expected the sample's batch, or guidance_scale="):
        scheduler.step(randn(4, *SHAPE[1:]), scheduler.timesteps[2], x)
    assert scheduler.step_index == 1


# ---- Ancestral sampling of a flow ----

ANCESTRAL = "LTXEulerAncestralRFScheduler"


@pytest.mark.parametrize("sigmas", [[1.0, 0.8, 0.5, 0.2, 0.0], [0.9, 0.6, 0.3, 0.1], [0.9, 0.5, 5e-9]])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_sampling_over_sigmas_that_are_given(sigmas, eta):
    """There is a timestep more than steps; a step from that one gives the sample back."""
    results, states = [], []
    for scheduler in pair(ANCESTRAL, eta=eta):
        scheduler.set_timesteps(sigmas=sigmas)
        x, seen, generator = randn(*SHAPE), [], torch.Generator().manual_seed(2)
        for t in [*scheduler.timesteps, scheduler.timesteps[-1]]:
            before = x
            x = scheduler.step(model(x, t, 1.0), t, x, generator=generator).prev_sample
            seen.append((x, None))
        assert x is before
        assert scheduler.step_index == len(sigmas) - 1
        results.append(seen)
        states.append(generator.get_state())
    assert largest_error(*results) < 2e-6
    assert torch.equal(*states)


def test_ancestral_sampling_begins_where_it_is_told_to():
    results = []
    for scheduler in pair(ANCESTRAL, eta=0.5):
        seen = []
        for begin in (2, 4):
            scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2, 0.0])
            scheduler.set_begin_index(begin)
            t, generator = scheduler.timesteps[begin], torch.Generator().manual_seed(2)
            seen.append((scheduler.step(randn(*SHAPE, seed=1), t, randn(*SHAPE), generator)[0], None))
        results.append(seen)
    assert largest_error(*results) < 2e-6


def test_ancestral_sampling_keeps_the_sample_s_dtype():
    results = []
    for scheduler in pair(ANCESTRAL, eta=0.5):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.0])
        x, generator = randn(*SHAPE, dtype=torch.bfloat16), torch.Generator().manual_seed(2)
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(model(x.float(), t, 1.0), t, x, generator=generator).prev_sample
        results.append([(x, None)])
    assert largest_error(*results) < 0.02
