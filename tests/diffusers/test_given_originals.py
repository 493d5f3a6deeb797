"""Steps of EDM's Euler that are given their x_0, as Cosmos' pipelines make them, beside diffusers' own."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import rare_pipelines
from tests.support.family_pipelines import result
from tests.support.scheduler_pair import SHAPE, diffusers, fused, pair, randn

NAME = "EDMEulerScheduler"
CONFIGS = [{}, {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"}, {"sigma_schedule": "exponential"}]


def loop(scheduler, x, *, dtype=None, as_output=False, **options):
    """Return the samples of a loop in which x_0 is made first, of two samples at once, and is guided."""
    scheduler.set_timesteps(6)
    seen = []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t).to(dtype or x.dtype)
        output = torch.cat([torch.tanh(given), torch.tanh(0.7 * given + 0.1)])
        uncond, cond = scheduler.step(output, t, torch.cat([x, x]), return_dict=False)[1].chunk(2)
        scheduler._step_index -= 1
        original = cond + 2.0 * (cond - uncond)
        x = scheduler.step(original, t, x, return_dict=as_output, pred_original_sample=original, **options)[0]
        seen.append(x)
    return seen


def error(got, expected):
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("as_output", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_loops_are_diffusers(config, as_output):
    ours, theirs = pair(NAME, **config)
    done = fused.accelerate(diffusers.CosmosTextToWorldPipeline(None, None, None, None, ours, rare_pipelines.Part()))
    got, expected = (loop(each, 80 * randn(*SHAPE), as_output=as_output) for each in (ours, theirs))
    assert error(got, expected) < 2e-6
    assert done.counts == {"fused without guidance": 12}
    assert ours.step_index == theirs.step_index == 6


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_diffusers(state, model):
    got, expected = (loop(each, (80 * randn(*SHAPE)).to(state), dtype=model) for each in pair(NAME))
    assert error(got, expected) < (0.03 if torch.bfloat16 in (state, model) else 2e-6)


def test_what_is_left_to_diffusers_is_its_own():
    """Churn with an x_0 that is given, autograd, and guidance of the output besides."""
    results, gradients = [], []
    for scheduler in pair(NAME):
        generator = torch.Generator().manual_seed(1)
        results.append(loop(scheduler, 80 * randn(*SHAPE), s_churn=3.0, generator=generator))
        scheduler.set_timesteps(6)
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(randn(*SHAPE), 3, randn(*SHAPE), pred_original_sample=randn(*SHAPE))
        scheduler.scale_model_input(randn(*SHAPE), scheduler.timesteps[0])
        original = randn(*SHAPE).requires_grad_()
        made = scheduler.step(original, scheduler.timesteps[0], randn(*SHAPE), pred_original_sample=original)
        made.prev_sample.sum().backward()
        gradients.append(original.grad)
    assert error(*results) < 2e-6
    assert torch.equal(*gradients)


def test_sigmas_that_are_changed_are_noticed():
    results = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(6)
        seen = []
        for change in (lambda: None, lambda scheduler=scheduler: scheduler.sigmas.square_()):
            change()
            scheduler._step_index = 2
            given = {"return_dict": False, "pred_original_sample": randn(*SHAPE)}
            seen.append(scheduler.step(randn(*SHAPE), scheduler.timesteps[2], randn(*SHAPE, seed=1), **given)[0])
        results.append(seen)
    assert error(*results) < 1e-6


def test_a_loop_of_one_s_own_gets_tensors():
    """Also over the scheduler of a pipeline that is accelerated, in the middle of its run."""
    pipe, given = rare_pipelines.cosmos()
    fused.accelerate(pipe)
    seen = []

    def look(pipe, step, timestep, values):
        scheduler = copy.deepcopy(pipe.scheduler)
        x = values["latents"]
        seen.append(scheduler.step(x, pipe.scheduler.timesteps[step], x, return_dict=False)[1])
        return {}

    with torch.no_grad():
        result(pipe, given, steps=3, callback_on_step_end=lambda *of: look(*of) if of[1] < 2 else {})
    assert len(seen) == 2
    assert all(isinstance(each, torch.Tensor) for each in seen)
