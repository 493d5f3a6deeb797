"""Tables that were made in inference mode, of which torch does not count who writes to them."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers.written_tables import state_of
from tests.diffusers.test_changed_tables import WITH_HISTORY, steps
from tests.support.scheduler_pair import SHAPE, fused, pair, randn

TABLES = {
    "DDIMScheduler": "alphas_cumprod",
    "DDPMScheduler": "alphas_cumprod",
    "EulerDiscreteScheduler": "sigmas",
    "FlowMatchEulerDiscreteScheduler": "sigmas",
    "LCMScheduler": "alphas_cumprod",
}


def replaced(scheduler, name):
    with torch.inference_mode():
        setattr(scheduler, name, getattr(scheduler, name).clone())


def changed(scheduler, name):
    with torch.inference_mode():
        getattr(scheduler, name)[2:].mul_(0.9)


def run(scheduler, name, at):
    """Return the samples of two loops, in the second of which the table is written to before a step."""
    samples = []
    for loop in range(2):
        scheduler.set_timesteps(8)
        replaced(scheduler, name)
        scheduler.is_scale_input_called = True
        torch.manual_seed(0)
        x = randn(*SHAPE)
        for number, t in enumerate(scheduler.timesteps):
            if loop and number == at:
                changed(scheduler, name)
            x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
            samples.append(x)
    return torch.stack(samples)


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("name", TABLES)
def test_steps_go_by_what_is_in_them(name, at):
    ours, theirs = (run(scheduler, TABLES[name], at) for scheduler in pair(name))
    assert (ours[8 + at :] - ours[at:8]).norm() > 1e-3 * ours[at:8].norm()
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_a_loop_that_goes_on_from_earlier_steps_refuses_them(name):
    scheduler = getattr(fused, name)()
    scheduler.set_timesteps(8)
    replaced(scheduler, WITH_HISTORY[name])
    steps(scheduler, 4)
    with pytest.raises(RuntimeError, match="expected the tables and the configuration that the loop began with"):
        steps(scheduler, 1, lambda scheduler: changed(scheduler, WITH_HISTORY[name]))
    scheduler.set_timesteps(8)
    steps(scheduler, 8)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_timesteps_too(name):
    """They are where a step is looked for."""
    samples = []
    for scheduler in pair(name):
        scheduler.set_timesteps(8)
        scheduler.is_scale_input_called = True
        replaced(scheduler, "timesteps")
        for first in (3, 5):
            x = randn(*SHAPE)
            scheduler._step_index = None
            for t in scheduler.timesteps[first:].clone():
                x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
            samples.append(x)
            with torch.inference_mode():
                scheduler.timesteps[4:].sub_(3)
    torch.testing.assert_close(samples[:2], samples[2:], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "ScoreSdeVeScheduler"])
def test_noise_of_their_levels(name):
    results, table = (
        [],
        {"DDIMScheduler": "alphas_cumprod", "ScoreSdeVeScheduler": "discrete_sigmas"}.get(name, "sigmas"),
    )
    for scheduler in pair(name):
        scheduler.set_timesteps(8)
        if name == "ScoreSdeVeScheduler":
            scheduler.set_sigmas(8)
        replaced(scheduler, table)
        made = []
        for number in range(4):
            if number == 2:
                changed(scheduler, table)
            if name == "ScoreSdeVeScheduler":
                generator = torch.Generator().manual_seed(number)
                made += scheduler.step_pred(randn(*SHAPE), scheduler.timesteps[3], randn(*SHAPE, seed=1), generator)[:2]
            else:
                made.append(scheduler.add_noise(randn(*SHAPE), randn(*SHAPE, seed=1), scheduler.timesteps[3:4]))
        results.append(torch.stack(made))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_nothing_is_read_of_those_on_a_device():
    """That would wait for it: there, a table is what it was while it is the same tensor."""
    with torch.inference_mode():
        assert state_of(torch.empty(3, device="meta")) is None
