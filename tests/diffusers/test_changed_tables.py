"""Tables and configurations that are changed by hand in the middle of a loop."""

from __future__ import annotations

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, fused, pair, randn

WITH_HISTORY = {
    "LMSDiscreteScheduler": "sigmas",
    "DPMSolverMultistepScheduler": "sigmas",
    "UniPCMultistepScheduler": "sigmas",
    "HeunDiscreteScheduler": "sigmas",
    "KDPM2DiscreteScheduler": "sigmas_interpol",
    "KDPM2AncestralDiscreteScheduler": "sigmas_down",
    "EDMDPMSolverMultistepScheduler": "sigmas",
}


def steps(scheduler, count, change=lambda scheduler: None, *, at=0, first=None):
    """Return the sample after some steps, before one of which the scheduler is changed."""
    scheduler.is_scale_input_called = True
    x = randn(*SHAPE) if first is None else first
    for number in range(count):
        if number == at:
            change(scheduler)
        index = scheduler.step_index or 0
        x = scheduler.step(torch.tanh(x), scheduler.timesteps[index], x, return_dict=False)[0]
    return x


def scaled(name, *, in_place=False):
    def change(scheduler):
        table = getattr(scheduler, name)
        if in_place:
            table.mul_(0.9)
        else:
            setattr(scheduler, name, table * 0.9)

    return change


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", WITH_HISTORY)
def test_a_loop_that_goes_on_from_earlier_steps_refuses_other_tables(name, in_place):
    """diffusers goes on with its own history; ours is of the rows that the loop began with."""
    scheduler = getattr(fused, name)()
    for _ in range(3):  # its steps are planned, then repeated
        scheduler.set_timesteps(8)
        steps(scheduler, 4)
    change = scaled(WITH_HISTORY[name], in_place=in_place)
    with pytest.raises(RuntimeError, match="expected the tables and the configuration that the loop began with"):
        steps(scheduler, 1, change)
    scheduler.set_timesteps(8)
    steps(scheduler, 8)


def test_a_loop_that_goes_on_from_earlier_steps_refuses_another_configuration():
    scheduler = fused.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(8)
    steps(scheduler, 2)
    scheduler.register_to_config(solver_order=3)
    with pytest.raises(RuntimeError, match="got others before step 2"):
        steps(scheduler, 1)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LCMScheduler"])
@pytest.mark.parametrize("at", [0, 3])
def test_solvers_without_a_history_go_on_by_other_tables(name, at):
    ours, theirs = pair(name)
    results, levels = [], "sigmas" if name == "EulerDiscreteScheduler" else "alphas_cumprod"
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
        torch.manual_seed(0)
        results.append(steps(scheduler, 8, scaled(levels), at=at))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


BEGINNINGS = [
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


@pytest.mark.parametrize("name", BEGINNINGS)
def test_tables_may_be_others_where_a_loop_begins(name):
    results = []
    for scheduler in pair(name):
        scheduler.set_timesteps(8)
        torch.manual_seed(0)
        results.append(steps(scheduler, 8, scaled("sigmas")))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_tables_that_say_the_same_change_nothing():
    results = []
    for scheduler in pair("DPMSolverMultistepScheduler"):
        scheduler.set_timesteps(8)

        def copied(scheduler):
            scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()

        results.append(steps(scheduler, 8, copied, at=3))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_loop_that_diffusers_has_begun_is_its_own_to_the_end():
    """Our rows know nothing of the steps that were left to it."""
    results = []
    for scheduler in pair("DPMSolverMultistepScheduler"):
        scheduler.set_timesteps(8)
        x = randn(*SHAPE).requires_grad_()
        x = scheduler.step(torch.tanh(x), scheduler.timesteps[0], x).prev_sample.detach()
        with torch.no_grad():
            results.append(steps(scheduler, 7, scaled("sigmas"), at=3, first=x))
    assert torch.equal(*results)


def test_cogvideox_goes_on_in_diffusers_from_what_it_is_given():
    results = []
    for scheduler in pair("CogVideoXDPMScheduler"):
        scheduler.set_timesteps(8)
        x, original = randn(*SHAPE), None
        generator = torch.Generator().manual_seed(0)
        for number, t in enumerate(scheduler.timesteps):
            if number == 3:
                scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
            back = scheduler.timesteps[number - 1] if number else None
            x, original = scheduler.step(torch.tanh(x), original, t, back, x, generator=generator)
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
