"""UniPC's history that is read in the middle of a loop, beside diffusers' own: what it is, and how the loop goes on."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch

from tests.support.counted_loops import BETAS, FLOW, first_of, largest_error, loop
from tests.support.scheduler_pair import fused, pair

NAME = "UniPCMultistepScheduler"
CONFIGS = {
    "unipc": {**BETAS, "final_sigmas_type": "zero"},
    "unipc 3 bh1": {**BETAS, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "unipc of noise": {**BETAS, "predict_x0": False, "final_sigmas_type": "sigma_min"},
    "unipc wan": {**FLOW, "flow_shift": 5.0, "final_sigmas_type": "zero", "disable_corrector": [3]},
    "unipc to the end": {**BETAS, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
}


def run(scheduler, at, dtype=None, edit=lambda scheduler: None, begin=None):
    """Return a loop's samples, and what the scheduler kept after a step."""
    kept = []

    def read(x, number):
        if number == at:
            outputs, last = scheduler.model_outputs, scheduler.last_sample
            kept.extend(None if each is None else each.clone() for each in (*outputs, last))
            kept.extend((scheduler.lower_order_nums, scheduler.this_order))
            edit(scheduler)
        return x

    x = first_of(scheduler) if dtype is None else first_of(scheduler).to(dtype)
    return loop(scheduler, x, edit=read, dtype=dtype, begin=begin), kept


def halve(scheduler):
    """Change what the scheduler keeps, as a pipeline may."""
    scheduler.model_outputs[-1] = 0.5 * scheduler.model_outputs[-1]
    scheduler.last_sample = 0.9 * scheduler.last_sample


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9, 10])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_history_that_is_read_is_diffusers(name, at):
    ours, theirs = pair(NAME, **CONFIGS[name])
    (got, kept), (expected, theirs_kept) = (run(each, at, edit=halve) for each in (ours, theirs))
    assert largest_error(got, expected) < 5e-6
    assert kept[-2:] == theirs_kept[-2:]
    for mine, other in zip(kept[:-2], theirs_kept[:-2], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and at < 9:  # what no call needs any more, before the last ones, is not kept here
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_a_loop_that_begins_later():
    results = [run(each, 3, edit=halve, begin=4)[0] for each in pair(NAME, **CONFIGS["unipc"])]
    assert largest_error(*results) < 5e-6


def test_a_sample_that_was_written_to():
    """The history is that of the sample as the step wrote it."""
    results = []
    for scheduler in pair(NAME, **CONFIGS["unipc"]):
        kept = []

        def write(x, number, scheduler=scheduler, kept=kept):
            if number == 4:
                x.mul_(0.5)
                kept.append(scheduler.last_sample.clone())
            return x

        results.append((loop(scheduler, first_of(scheduler), edit=write), kept))
    assert largest_error(results[0][0], results[1][0]) < 5e-6
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-5, atol=2e-5)


def in_place(scheduler, steps=8):
    """Return the samples of a loop that writes each result into the first sample's memory, as SkyReels' does."""
    scheduler.set_timesteps(steps)
    latents = torch.stack([first_of(scheduler)] * 2, 2)
    results, part = [], latents[:, :, 1]
    for t in scheduler.timesteps:
        latents[:, :, 1] = scheduler.step(torch.tanh(part), t, latents[:, :, 1], return_dict=False)[0]
        results.append(part.clone())
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loop_that_writes_into_the_sample_s_memory(name):
    """diffusers corrects by what has become of a sample that it had not corrected itself."""
    ours, theirs = pair(NAME, **CONFIGS[name])
    ours._fusion = fusion = fused.pipelines.Fusion()
    got, expected = in_place(ours), in_place(theirs)
    assert largest_error(got, expected) < 5e-6
    assert fusion.counts["fused without guidance"] == 1


def test_a_sample_is_kept_for_one_step():
    scheduler = getattr(fused, NAME)(**CONFIGS["unipc"])
    scheduler.set_timesteps(4)
    x = first_of(scheduler)
    for number, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
        assert (scheduler._given is not None) == (number == 0)
    assert not scheduler._handed_over


def test_a_sample_is_neither_copied_nor_kept_for_another_loop():
    scheduler = getattr(fused, NAME)(**CONFIGS["unipc"])
    scheduler.set_timesteps(4)
    x = first_of(scheduler)
    scheduler.step(torch.tanh(x), scheduler.timesteps[0], x)
    given = weakref.ref(x)
    for each in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert each._given is None
        assert each._copied_loop is not None
    assert scheduler._given is not None
    scheduler.set_timesteps(4)
    del x
    assert given() is None


def test_a_first_step_that_was_refused_leaves_nothing():
    scheduler = getattr(fused, NAME)(**CONFIGS["unipc"])
    scheduler.set_timesteps(6)
    x, t = first_of(scheduler), scheduler.timesteps[0]
    with pytest.raises(ValueError, match="model_output: expected the sample's batch, or guidance_scale="):
        scheduler.step(torch.cat([x, x]), t, x)
    assert scheduler.model_outputs == [None, None]
    assert not scheduler._handed_over


def test_a_model_in_bfloat16():
    results = [run(each, 4, torch.bfloat16) for each in pair(NAME, **CONFIGS["unipc"])]
    (got, kept), (expected, _) = results
    assert largest_error(got, expected) < 0.05
    assert {each.dtype for each in kept[:-2]} == {torch.bfloat16}


def test_only_the_rest_of_a_loop_is_left_to_diffusers():
    scheduler = getattr(fused, NAME)(**CONFIGS["unipc"])
    scheduler._fusion = fusion = fused.pipelines.Fusion()
    assert scheduler.model_outputs == [None, None]
    run(scheduler, 5)
    assert fusion.counts == {
        "fused without guidance": 6, "left to diffusers: a history that was read, and may have been changed": 6,
    }  # fmt: skip
    fusion.counts.clear()
    run(scheduler, None)
    assert scheduler.last_sample is None
    assert fusion.counts == {"fused without guidance": 12}
