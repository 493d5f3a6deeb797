"""The score SDE's scheduler beside diffusers' own: samples, their means, and the noise of both kinds of steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support import rare_pipelines
from tests.support.diffusers_in_float64 import in_float64
from tests.support.scheduler_pair import SHAPE, diffusers, fused, pair, randn

NAME = "ScoreSdeVeScheduler"
STEPS = 30


def set_steps(scheduler, steps=STEPS):
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    return scheduler


def loop(scheduler, x, generator=None, dtype=None):
    """Return the samples and means of a loop, of a model that computes in ``dtype``."""
    set_steps(scheduler)
    seen = []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=True):
        x = scheduler.step_correct(-x / (sigma**2 + 1), x, generator=generator).prev_sample
        result = scheduler.step_pred((-x / (sigma**2 + 1)).to(dtype or x.dtype), t, x, generator=generator)
        x = result.prev_sample
        seen += [x, result.prev_sample_mean]
    return seen


def error(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("config", [{}, {"sigma_min": 0.1, "sigma_max": 50.0, "sampling_eps": 1e-3}])
def test_loops_are_diffusers(config, monkeypatch):
    ours, theirs = pair(NAME, **config)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = loop(theirs, 50 * randn(*SHAPE), generators[1])
    monkeypatch.setattr(f"diffusers.{NAME}.step_pred", None)
    got = loop(ours, 50 * randn(*SHAPE), generators[0])
    assert error(got, expected) < 2e-6
    assert torch.equal(*(each.get_state() for each in generators))


@pytest.mark.parametrize("place", [0, 7, STEPS - 1])
def test_a_step_is_as_near_to_float64_as_diffusers(place, monkeypatch):
    """Over the same sigmas, which float32 makes."""
    ours, theirs = map(set_steps, pair(NAME))
    x, output, noise = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    exact = set_steps(diffusers.ScoreSdeVeScheduler())
    exact.discrete_sigmas = exact.discrete_sigmas.double()
    monkeypatch.setattr("diffusers.schedulers.scheduling_sde_ve.randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr("fastguide.diffusers.ve_schedulers.noise_of", lambda *_, **__: (noise, None))
    t = theirs.timesteps[place]
    results = [list(scheduler.step_pred(output, t, x).values()) for scheduler in (ours, theirs)]
    monkeypatch.setattr("diffusers.schedulers.scheduling_sde_ve.randn_tensor", lambda *_, **__: noise.double())
    with in_float64(diffusers.ScoreSdeVeScheduler):
        reference = list(exact.step_pred(output.double(), t, x.double()).values())
    for got, expected, true in zip(*results, reference, strict=True):
        assert (got - true).norm() <= 2 * (expected - true).norm() + 1e-7 * true.norm()


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_diffusers(state, model):
    """And the generators are at the same place."""
    results, states = [], []
    for scheduler in map(set_steps, pair(NAME)):
        generator = torch.Generator().manual_seed(3)
        x = randn(*SHAPE).to(state)
        results.append([*scheduler.step_pred((0.1 * x).to(model), scheduler.timesteps[20], x, generator).values()])
        states.append(generator.get_state())
    assert error(*results) < (0.02 if min(torch.finfo(state).bits, torch.finfo(model).bits) < 32 else 1e-6)
    assert torch.equal(*states)


def test_timesteps_are_numbers_or_tensors_on_the_host():
    ours, theirs = map(set_steps, pair(NAME))
    x, results = randn(*SHAPE), []
    for scheduler in (ours, theirs):
        seen = []
        for t in (0.3, 1, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.2, 0.9])):
            seen.append(scheduler.step_pred(0.1 * x, t, x, torch.Generator().manual_seed(1), return_dict=False)[0])
        results.append(seen)
    assert error(*results) < 1e-6


def test_sigmas_that_are_changed_are_noticed():
    results = []
    for scheduler in map(set_steps, pair(NAME)):
        x, t, seen = randn(*SHAPE), scheduler.timesteps[5], []
        for change in (
            lambda scheduler=scheduler: None,
            lambda scheduler=scheduler: scheduler.discrete_sigmas.mul_(0.5),
            lambda scheduler=scheduler: scheduler.set_sigmas(STEPS, sigma_max=20.0),
        ):
            change()
            seen.append(scheduler.step_pred(0.1 * x, t, x, torch.Generator().manual_seed(1)).prev_sample)
        results.append(seen)
    assert error(*results) < 1e-6


def test_sigmas_that_fall_are_left_to_diffusers():
    """It takes the root of a negative variance, which is NaN; the noise is drawn all the same."""
    results, states = [], []
    for scheduler in map(set_steps, pair(NAME)):
        generator = torch.Generator().manual_seed(1)
        scheduler.discrete_sigmas = scheduler.discrete_sigmas.flip(0)
        results.append(scheduler.step_pred(randn(*SHAPE), scheduler.timesteps[5], randn(*SHAPE), generator))
        states.append(generator.get_state())
    assert all(each.isnan().all() for result in results for each in result.values())
    assert torch.equal(*states)


def test_guidance_is_part_of_the_step():
    ours, theirs = map(set_steps, pair(NAME))
    x, t = randn(*SHAPE), ours.timesteps[9]
    uncond, cond = 0.3 * x, 0.1 + 0.2 * x
    expected = theirs.step_pred(uncond + 3 * (cond - uncond), t, x, torch.Generator().manual_seed(1))
    doubled = torch.cat([uncond, cond])
    got = ours.step_pred(doubled, t, x, torch.Generator().manual_seed(1), guidance_scale=3.0)
    assert error([*got.values()], [*expected.values()]) < 1e-6


def test_what_is_left_to_diffusers_is_its_own():
    gradients = []
    for scheduler in pair(NAME):
        unset = type(scheduler)()
        unset.timesteps = None
        with pytest.raises(ValueError, match="need to run 'set_timesteps'"):
            unset.step_pred(randn(*SHAPE), 0.5, randn(*SHAPE))
        set_steps(scheduler)
        with pytest.raises(IndexError):
            scheduler.step_pred(randn(*SHAPE), 1.5, randn(*SHAPE))
        output = randn(*SHAPE).requires_grad_()
        scheduler.step_pred(output, scheduler.timesteps[3], randn(*SHAPE)).prev_sample.sum().backward()
        gradients.append(output.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_a_scheduler_step_alike(how):
    scheduler = set_steps(fused.ScoreSdeVeScheduler())
    expected = loop(scheduler, randn(*SHAPE), torch.Generator().manual_seed(0))
    assert all(map(torch.equal, loop(how(scheduler), randn(*SHAPE), torch.Generator().manual_seed(0)), expected))


@pytest.mark.parametrize("inference", [False, True])
def test_the_pipeline_makes_the_same(inference):
    pipe = rare_pipelines.score_sde()
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(2)
        return torch.from_numpy(pipe(2, num_inference_steps=8, output_type="np", generator=generator).images)

    before = run()
    done = fused.accelerate(pipe)
    assert done.exchanged == {"scheduler": NAME}
    with torch.inference_mode(inference):
        torch.testing.assert_close(run(), before, rtol=2e-4, atol=2e-4)
    assert done.counts == {"fused without guidance": 8}
    fused.restore(pipe)
    assert torch.equal(run(), before)
