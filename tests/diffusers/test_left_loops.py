"""A loop that diffusers' own steps have begun stays with diffusers, whose history they go on from."""

from __future__ import annotations

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, pair, randn

STEPS = 6
NAMES = (
    "SASolverScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "LMSDiscreteScheduler", "EDMDPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "IPNDMScheduler",
)  # fmt: skip


def replace_a_table(scheduler):
    """Put an equal tensor in the place of one, by which the loop's table is looked for again."""
    name = "betas" if type(scheduler).__name__ == "IPNDMScheduler" else "sigmas"
    setattr(scheduler, name, getattr(scheduler, name).clone())


@pytest.mark.parametrize("at", [STEPS - 2, STEPS - 1])
@pytest.mark.parametrize("name", NAMES)
def test_also_where_a_table_is_replaced_before_its_last_steps(name, at):
    """The rows of these alone may need no history, as those of a lower order at the end."""
    found = []
    for scheduler in pair(name):
        scheduler.set_timesteps(STEPS)
        scheduler.is_scale_input_called = True
        x, generator = randn(*SHAPE), torch.Generator().manual_seed(1)
        options = {"generator": generator} if name.startswith("SA") else {}
        for number, t in enumerate(scheduler.timesteps):
            if number == at:
                replace_a_table(scheduler)
            output = torch.tanh(0.4 * x)
            if number == 0:
                output.requires_grad_()  # this step is left to diffusers
            x = scheduler.step(output, t, x, return_dict=False, **options)[0].detach()
        found.append(x)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_also_where_some_of_its_timesteps_are_those_of_the_table():
    """Of copies in bfloat16, those that are not rounded; diffusers finds the first step by rounding its own as well."""
    found = []
    for scheduler in pair("SASolverScheduler"):
        for _ in range(2):
            scheduler.set_timesteps(8)
            x, generator = randn(*SHAPE), torch.Generator().manual_seed(1)
            for t in scheduler.timesteps:
                output = torch.tanh(0.4 * x)
                x = scheduler.step(output, t.bfloat16(), x, generator=generator, return_dict=False)[0]
            found.append(x)
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-5, atol=1e-5)


def test_a_loop_after_one_that_began_at_another_timestep_is_fused():
    ours, _ = pair("SASolverScheduler")
    for as_given in (torch.Tensor.bfloat16, torch.Tensor.clone):
        ours.set_timesteps(8)
        x = randn(*SHAPE)
        for t in ours.timesteps:
            x = ours.step(torch.tanh(0.4 * x), as_given(t), x, return_dict=False)[0]
    assert ours._counted.table is not None


def test_nothing_follows_its_last_step_if_that_is_left():
    """Of a solver without a history, whose other steps are fused."""
    ours, _ = pair("EulerDiscreteScheduler")
    ours.set_timesteps(STEPS)
    x = randn(*SHAPE)
    for number, t in enumerate(ours.timesteps):
        output = torch.tanh(0.4 * ours.scale_model_input(x, t)).requires_grad_(number == STEPS - 1)
        x = ours.step(output, t, x, return_dict=False)[0].detach()
    given = ours.scale_model_input(x, t)
    with pytest.raises(IndexError, match=f"no more than the {STEPS} of this loop"):
        ours.step(given, t, x)
