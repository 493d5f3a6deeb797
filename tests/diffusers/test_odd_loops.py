"""Loops that rows cannot express, which are diffusers' own from the first step to the last."""

from __future__ import annotations

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, pair, randn

LOOPS = {  # configuration, steps, and the step to begin with
    "a step that is the identity": ("IPNDMScheduler", {}, 1, None),
    "flow matching, the same": (
        "FlowMatchEulerDiscreteScheduler",
        {"invert_sigmas": True, "stochastic_sampling": True},
        1,
        None,
    ),
    "consistency, the same": ("FlowMatchLCMScheduler", {"invert_sigmas": True}, 1, None),
    "timesteps that are no numbers": (
        "KDPM2AncestralDiscreteScheduler",
        {"beta_schedule": "squaredcos_cap_v2"},
        5,
        None,
    ),
    "no signal": ("LCMScheduler", {"rescale_betas_zero_snr": True}, 4, None),
    "no signal, with jumps": ("TCDScheduler", {"rescale_betas_zero_snr": True}, 4, None),
    "no flow": (
        "UniPCMultistepScheduler",
        {"use_exponential_sigmas": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        5,
        None,
    ),
    "a last step that does not go through x_0": (
        "SASolverScheduler",
        {"thresholding": True, "use_exponential_sigmas": True, "timestep_spacing": "trailing"},
        5,
        4,
    ),
}


def run(scheduler, steps, begin=None, edit=lambda scheduler, number: scheduler):
    scheduler.set_timesteps(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    scheduler.is_scale_input_called = True
    x, samples, generator = randn(*SHAPE), [], torch.Generator().manual_seed(0)
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for number, t in enumerate(scheduler.timesteps[begin or 0 :]):
        scheduler = edit(scheduler, number)
        x = scheduler.step(torch.tanh(0.5 * x), t, x, return_dict=False, **options)[0]
        samples.append(x)
    return torch.stack(samples)


@pytest.mark.parametrize("case", LOOPS)
def test_what_a_table_cannot_say(case):
    name, config, steps, begin = LOOPS[case]
    torch.testing.assert_close(
        *(run(each, steps, begin) for each in pair(name, **config)), equal_nan=True, rtol=0, atol=0
    )


def test_no_signal_in_a_loop_that_is_given_its_x0():
    results = []
    for scheduler in pair("CogVideoXDPMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing"):
        scheduler.set_timesteps(4)
        x, old, back, generator = randn(*SHAPE), None, None, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x, old = scheduler.step(torch.tanh(0.5 * x), old, t, back, x, generator=generator)
            results.append(x)
            back = t
    torch.testing.assert_close(results[:4], results[4:], equal_nan=True, rtol=0, atol=0)
