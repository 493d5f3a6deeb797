"""Helios' scheduler beside diffusers' own: stages, what it returns, and where its loops begin."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from fastguide.solvers.unipc import _weights
from tests.support.counted_loops import largest_error, model
from tests.support.scheduler_pair import SHAPE, fused, pair, randn

NAME = "HeliosScheduler"
STAGES = [{}, {"scheduler_type": "euler"}, {"use_dynamic_shifting": True, "gamma": 0.25}, {"solver_order": 1}]


def pyramid(scheduler, dtype=torch.float32):
    """Return the samples of a loop at each stage, as pipelines run them in tuples, each of twice the size."""
    x, seen = randn(1, 3, 4, 4), []
    for stage in range(3):
        scheduler.set_timesteps(5, stage, device="cpu", mu=0.8)
        x = x if stage == 0 else 0.9 * x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x.to(dtype), t, 1.0), t, x, return_dict=False)[0]
            seen.append((x, None))
    return seen


@pytest.mark.parametrize("config", STAGES)
def test_a_pyramid_of_stages(config, monkeypatch):
    ours, theirs = pair(NAME, **config)
    expected = pyramid(theirs)
    monkeypatch.setattr(f"diffusers.{NAME}.step", None)
    assert largest_error(pyramid(ours), expected) < 2e-6


def test_a_pyramid_with_a_model_in_bfloat16():
    ours, theirs = pair(NAME)
    assert largest_error(pyramid(ours, torch.bfloat16), pyramid(theirs, torch.bfloat16)) < 0.02


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_has_the_corrected_sample(edits, dtype):
    """It is made of the last sample as the scheduler wrote it, and so is diffusers' own, whatever a caller hands in."""
    results, orders = [], []
    for scheduler in pair(NAME, stages=1, disable_corrector=[2]):
        scheduler.set_timesteps(6)
        x, seen = randn(*SHAPE, dtype=dtype), []
        for number, t in enumerate(scheduler.timesteps):
            output = scheduler.step(model(x, t, 1.0), t, x)
            seen.append((output.prev_sample, output.last_sample))
            orders.append(output.this_order)
            assert output.model_outputs is None
            x = output.prev_sample
            x = 0.9 * x + 0.1 if edits and number in (1, 4) else x
        results.append(seen)
    assert largest_error(*results) < (2e-6 if dtype == torch.float32 else 0.03)
    assert orders[:6] == orders[6:]


def test_a_tuple_is_as_long_as_diffusers_and_refuses_the_corrected_sample():
    results = []
    for scheduler in pair(NAME, stages=1):
        scheduler.set_timesteps(6)
        results.append(scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE), return_dict=False))
    (x, none, last, order), (expected, _, theirs, their_order) = results
    torch.testing.assert_close(x, expected)
    assert (none, last.shape, order) == (None, theirs.shape, their_order)
    with pytest.raises(RuntimeError, match="last_sample: expected to be read of an output"):
        last + 1


@pytest.mark.parametrize("scheduler_type", ["unipc", "euler"])
def test_loops_begin_at_the_first_step_whatever_they_are_told(scheduler_type):
    results = []
    for scheduler in pair(NAME, stages=1, scheduler_type=scheduler_type):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(3)
        x, seen = randn(*SHAPE), []
        for t in (scheduler.timesteps[3], scheduler.timesteps[5], None):
            x = scheduler.step(model(x, 1.0, 1.0), t, x)[0]
            seen.append((x, None))
        results.append(seen)
    assert largest_error(*results) < 2e-6
    again = getattr(fused, NAME)(stages=1, scheduler_type=scheduler_type)
    again.set_timesteps(6)
    firsts = []
    for _ in range(2):
        again._step_index, x = None, randn(*SHAPE)
        for t in again.timesteps[:3]:
            x = again.step(model(x, 1.0, 1.0), t, x, return_dict=False)[0]
        firsts.append(x)
    assert torch.equal(*firsts)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"solver_type": "bh1"}, "a logarithm of the signal-to-noise ratio that is infinite, with bh1"),
        ({"prediction_type": "sample"}, "a configuration that rows do not express"),
        ({"solver_order": 4}, "an order above 3"),
    ],
)
def test_what_rows_do_not_express_is_left_to_diffusers(config, reason):
    results = []
    for scheduler in pair(NAME, stages=1, **config):
        scheduler.set_timesteps(6)
        x, seen = randn(*SHAPE), []
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, 1.0), t, x).prev_sample
            seen.append((x, None))
        results.append(seen)
        if type(scheduler) is getattr(fused, NAME):
            assert scheduler._counted.made.why_not == reason
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for (a, _), (b, _) in zip(*results, strict=True))


def test_thresholding_has_no_numbers():
    """Euler's steps ignore it, and diffusers' own step of UniPC raises: it has no method and no numbers for it."""
    results = []
    for scheduler in pair(NAME, stages=1, scheduler_type="euler", thresholding=True):
        scheduler.set_timesteps(6)
        x, seen = randn(*SHAPE), []
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, 1.0), t, x).prev_sample
            seen.append((x, None))
        results.append(seen)
        assert type(scheduler) is not getattr(fused, NAME) or scheduler._counted.table is not None
    assert largest_error(*results) < 2e-6
    for scheduler in pair(NAME, stages=1, thresholding=True):
        scheduler.set_timesteps(6)
        with pytest.raises(AttributeError, match="_threshold_sample"):
            scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE))


@pytest.mark.parametrize("config", [{}, {"solver_type": "bh1"}, {"disable_corrector": [3]}])
def test_the_third_order(config):
    """From a sigma below 1, as the pipeline gives them."""
    results = []
    for scheduler in pair(NAME, stages=1, solver_order=3, shift=2.0, **config):
        scheduler.set_timesteps(8, sigmas=numpy.linspace(0.999, 0.0, 9)[:-1])
        x, seen = randn(*SHAPE), []
        for t in scheduler.timesteps:
            output = scheduler.step(model(x, t, 1.0), t, x)
            x = output.prev_sample
            seen.append((x, output.last_sample))
        results.append(seen)
    assert largest_error(*results) < 5e-6


@pytest.mark.parametrize("ratios", [[-0.7, -math.inf, 1.0], [-math.inf, 1.0]])
def test_an_entry_of_noise_alone_has_the_weight_of_the_limit(ratios):
    """diffusers divides infinity by infinity there, in the third order."""
    far = [max(ratio, -1e9) for ratio in ratios]
    for got, expected in zip(_weights(ratios, -0.4, -0.33), _weights(far, -0.4, -0.33), strict=True):
        assert [*got] == pytest.approx([*expected], abs=1e-7)
    results = []
    for scheduler in (getattr(fused, NAME)(stages=1, solver_order=3), getattr(fused, NAME)(stages=1)):
        scheduler.set_timesteps(80)
        x = randn(*SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, 1.0), t, x, return_dict=False)[0]
        results.append(x)
    third, second = results  # two orders of one method, which meet with the number of steps
    assert (third - second).norm() < 0.002 * second.norm()


def test_a_table_is_of_one_loop():
    assert len(fused.step_table(getattr(fused, NAME)(stages=1), 5)) == 5
    with pytest.raises(ValueError, match="scheduler: expected one with a single loop, got one with 3 stages"):
        fused.step_table(getattr(fused, NAME)(), 5)
