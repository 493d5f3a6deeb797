"""Steps of fake tensors leave a scheduler as it was: later ones, of real tensors, find none of theirs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from tests.support.scheduler_pair import fused, randn

SHAPE, STEPS = (2, 4, 8, 8), 6
BY_SIGMA = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "EDMEulerScheduler",
]
COUNTED = [
    *BY_SIGMA,
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
]


def scheduler_of(name):
    scheduler = getattr(fused, name)()
    scheduler.set_timesteps(STEPS)
    return scheduler


def steps(scheduler, x, calls):
    """Return the samples on the way, as a pipeline makes them."""
    way = []
    for t in scheduler.timesteps[:calls].tolist():
        t = torch.tensor(t)
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        generator = torch.Generator().manual_seed(3)
        options = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
        way.append(x := scheduler.step(0.3 * given, t, x, return_dict=False, **options)[0])
    return way


def steps_of_fakes(scheduler, calls):
    """Make steps whose place diffusers' own mode would not find by the values of the timesteps."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(SHAPE)
        for call in range(calls):
            scheduler._step_index = call
            x = scheduler.step(0.3 * x, scheduler.timesteps[call], x, return_dict=False)[0]
            assert type(x) is FakeTensor


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("name", COUNTED)
def test_a_loop_begun_anew(name, calls):
    """By the tables that the fake loop has made, which are found again by their values."""
    scheduler, x = scheduler_of(name), randn(*SHAPE)
    if name != "PNDMScheduler":
        steps_of_fakes(scheduler, calls)
    else:
        first = int(scheduler.timesteps[0])
        with FakeTensorMode(allow_non_fake_inputs=True):
            scheduler.step(torch.empty(SHAPE), first, torch.empty(SHAPE))
    scheduler.set_timesteps(STEPS)
    got, expected = (steps(each, x, 5) for each in (scheduler, scheduler_of(name)))
    for ours, fresh in zip(got, expected, strict=True):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("name", [name for name in BY_SIGMA if name.startswith(("Euler", "FlowMatch"))])
def test_a_step_of_the_same_loop(name):
    """Of schedulers that leave nothing for later calls, without ``set_timesteps``."""
    scheduler, x = scheduler_of(name), randn(*SHAPE)
    steps_of_fakes(scheduler, 1)
    scheduler._step_index = None
    got, expected = (steps(each, x, 3) for each in (scheduler, scheduler_of(name)))
    assert all(map(torch.equal, got, expected))
