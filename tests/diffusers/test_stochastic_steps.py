"""Steps that draw noise are made without a plan, by the shortest way: what they draw is what diffusers does."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers import counted_again, counted_step
from fastguide.step.backends.registry import BACKENDS
from tests.support.counted_loops import BETAS
from tests.support.scheduler_pair import SHAPE, pair, randn

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

STEPS = 8
SCHEDULERS = {
    "SASolverScheduler": BETAS,
    "EulerAncestralDiscreteScheduler": BETAS,
    "KDPM2AncestralDiscreteScheduler": BETAS,
    "DPMSolverMultistepScheduler": {**BETAS, "algorithm_type": "sde-dpmsolver++"},
    "FlowMatchLCMScheduler": {"shift": 3.0},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "CMStochasticIterativeScheduler": {},
}
BOTH = torch.cat([randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)])


def guided_loop(scheduler, *, ours, generator, dtype=torch.float32):
    scheduler.set_timesteps(STEPS)
    output, x = BOTH.to(dtype), randn(*SHAPE).to(dtype)
    uncond, cond = output.chunk(2)
    for t in scheduler.timesteps:
        if ours:
            x = scheduler.step(output, t, x, generator=generator, return_dict=False, guidance_scale=7.0)[0]
        else:
            x = scheduler.step(uncond + 7.0 * (cond - uncond), t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.fixture
def slower(monkeypatch):
    """The steps that were planned, or that were not made by ``follow`` alone."""
    made = []
    for module, name in ((counted_step, "run_counted"), (counted_again, "_general_step_again")):
        function = getattr(module, name)

        def noted(*arguments, function=function, name=name, **options):
            made.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, noted)
    return made


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_after_the_first_loops_only_follow(name, slower):
    ours, theirs = pair(name, **SCHEDULERS[name])
    for seed in range(3):
        slower.clear()
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        got = guided_loop(ours, ours=True, generator=generators[0])
        expected = guided_loop(theirs, ours=False, generator=generators[1])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert not slower


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_dtypes_leave_the_generator_as_diffusers_does(name, dtype):
    ours, theirs = pair(name, **SCHEDULERS[name])
    for seed in range(3):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        got = guided_loop(ours, ours=True, generator=generators[0], dtype=dtype)
        expected = guided_loop(theirs, ours=False, generator=generators[1], dtype=dtype)
        assert got.dtype == expected.dtype
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
