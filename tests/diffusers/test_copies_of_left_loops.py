"""Copies of schedulers in the middle of a loop that is left to diffusers, whose own steps they go on from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.diffusers.test_odd_loops import run
from tests.support.scheduler_pair import SHAPE, pair, randn

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_copy_of_a_loop_that_began_in_the_middle_of_a_step(name, how):
    def copied(scheduler, number):
        return COPIES[how](scheduler) if number in (1, 4) else scheduler

    ours, theirs = (run(each, 6, 3, copied) for each in pair(name))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"])
def test_a_copy_of_a_loop_whose_first_step_was_of_another_shape(name, how):
    """Its earlier outputs are in diffusers' own memory, from where the copy goes on."""
    results = []
    for scheduler in pair(name):
        scheduler.set_timesteps(8)
        scheduler.is_scale_input_called = True
        x = randn(*SHAPE)
        for number, t in enumerate(scheduler.timesteps):
            output = torch.tanh(0.5 * x)
            x = scheduler.step(output[:1] if number == 0 else output, t, x, return_dict=False)[0]
            if number == 2:
                scheduler = COPIES[how](scheduler)
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_begins_loops_of_its_own(how):
    """Those are fused again."""
    ours, theirs = pair("HeunDiscreteScheduler")
    copies = []

    def copied(scheduler, number):
        copies.append(COPIES[how](scheduler))
        return scheduler

    run(ours, 6, 3, copied)
    other = copies[2]
    assert other._handed_over == "a loop that begins in the middle of a step"
    other._begin_index = None
    torch.testing.assert_close(run(other, 6), run(theirs, 6))
    assert other._handed_over == ""
    assert other._ended.table is not None
