"""Steps that draw noise are made without a plan, most by the shortest way: what they draw is what diffusers does."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers import counted_again, counted_step
from fastguide.step import torch_normals
from fastguide.step.attached import functions
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


def guided_loop(scheduler, *, ours, generator, dtype=torch.float32, shape=SHAPE):
    scheduler.set_timesteps(STEPS)
    x = randn(*shape).to(dtype)
    output = torch.cat([randn(*shape, seed=1), randn(*shape, seed=2)]).to(dtype)
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


CHURNED = {
    "EulerDiscreteScheduler": BETAS,
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "EDMEulerScheduler": {},
}


@pytest.mark.parametrize("window", [{}, {"s_tmin": 0.3, "s_tmax": 4.0}])
@pytest.mark.parametrize("name", CHURNED)
def test_steps_that_begin_with_noise_need_no_plan(name, window, slower):
    """Their x_0 is made with them: nobody can draw the noise again."""
    ours, theirs = pair(name, **CHURNED[name])
    for seed in range(3):
        slower.clear()
        generators, results = [torch.Generator().manual_seed(seed) for _ in range(2)], []
        for scheduler, generator in zip((ours, theirs), generators, strict=True):
            scheduler.set_timesteps(STEPS)
            x, originals, output = randn(*SHAPE), [], randn(*SHAPE, seed=1)
            for t in scheduler.timesteps:
                made = scheduler.step(output, t, x, s_churn=4.0, generator=generator, **window)
                x = made.prev_sample
                originals.append(getattr(made, "pred_original_sample", x))
            results.append(torch.stack([x, *originals]))
        scale = float(results[1].abs().max())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4 * scale)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert "run_counted" not in slower


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


GENERATORS = {
    "the default one": lambda: [None],
    "one": lambda: torch.Generator().manual_seed(7),
    "a list of one": lambda: [torch.Generator().manual_seed(7)],
    "one a sample": lambda: [torch.Generator().manual_seed(seed) for seed in (7, 8)],
}


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 5, 7), (2, 1, 1, 3)])
@pytest.mark.parametrize("generators", GENERATORS)
@pytest.mark.parametrize("name", ["SASolverScheduler", "EulerAncestralDiscreteScheduler"])
def test_any_generators_draw_what_torch_draws(name, generators, shape, monkeypatch):
    """The bits of steps whose noise torch draws, and diffusers' generators after them."""

    def made(scheduler, *, ours=True):
        for _ in range(3):
            torch.default_generator.manual_seed(7)
            generator = GENERATORS[generators]()
            given = generator if generator != [None] else None
            x = guided_loop(scheduler, ours=ours, generator=given, shape=shape)
        each = generator if isinstance(generator, list) else [generator]
        return x, [(torch.default_generator if g is None else g).get_state() for g in each]

    fast, theirs = pair(name, **SCHEDULERS[name])
    x, states = made(fast)
    expected, expected_states = made(theirs, ours=False)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(map(torch.equal, states, expected_states))
    trusted = torch_normals.is_torch_s()
    monkeypatch.setattr(torch_normals, "is_torch_s", lambda: False)  # then torch draws
    functions.trust_draws(False)
    try:
        assert torch.equal(x, made(pair(name, **SCHEDULERS[name])[0])[0])
    finally:
        functions.trust_draws(trusted)
