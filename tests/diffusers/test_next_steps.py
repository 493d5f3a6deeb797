"""A loop's next step is made without a plan as long as all that it depends on is as it was, and only then."""

from __future__ import annotations

import contextlib
import sys

import diffusers
import pytest
import torch

from fastguide.diffusers import counted_again, counted_step
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.repeat import forget
from tests.support.counted_loops import BETAS
from tests.support.scheduler_pair import SHAPE, pair, randn

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

STEPS, CHANGED = 8, 5
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "EulerDiscreteScheduler": BETAS,
    "LMSDiscreteScheduler": BETAS,
    "UniPCMultistepScheduler": {**BETAS, "final_sigmas_type": "zero"},
    "SASolverScheduler": BETAS,
    "EulerAncestralDiscreteScheduler": BETAS,
}
BOTH = torch.cat([randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)])


def of_sigmas(change):
    def changed(scheduler, given):
        with contextlib.suppress(AttributeError):
            scheduler.sigmas = change(scheduler.sigmas)

    return changed


def written(tensor):
    tensor[CHANGED:] *= 0.9
    return tensor


def set_attribute(name, value):
    return lambda scheduler, given: setattr(scheduler, name, value)


def register(scheduler, given):
    scheduler.register_to_config(num_train_timesteps=1000)


def write_config(scheduler, given):
    scheduler._internal_dict = type(scheduler._internal_dict)(scheduler._internal_dict)


def in_place(scheduler, given):
    given["sample"].mul_(0.9)


def given(**changed):
    return lambda scheduler, given: given.update(
        {name: value() if callable(value) else value for name, value in changed.items()}
    )


def inference():
    with torch.inference_mode():
        return BOTH.clone()


CHANGES = {
    "another scale": given(guidance_scale=3.0),
    "a scale of an int": given(guidance_scale=7),
    "scales": given(guidance_scale=[7.0, 7.0]),
    "no scale": given(guidance_scale=None, model_output=lambda: BOTH[:2].clone()),
    "a narrower output": given(model_output=lambda: BOTH.half()),
    "a wider output": given(model_output=lambda: BOTH.double()),
    "an output in another layout": given(model_output=lambda: BOTH.to(memory_format=torch.channels_last)),
    "an output that wants a gradient": given(model_output=lambda: BOTH.clone().requires_grad_()),
    "an inference tensor": given(model_output=inference),
    "an output that does not fit": given(model_output=lambda: BOTH[:3]),
    "latents of one's own": lambda scheduler, given: given.update(sample=0.9 * given["sample"]),
    "latents edited in place": in_place,
    "latents in another layout": lambda scheduler, given: given["sample"].transpose_(2, 3),
    "sigmas that are written": of_sigmas(written),
    "sigmas of one's own": of_sigmas(torch.clone),
    "timesteps of one's own": lambda scheduler, given: setattr(scheduler, "timesteps", scheduler.timesteps.clone()),
    "a configuration": register,
    "the same configuration": write_config,
    "an attribute": set_attribute("disable_corrector", [CHANGED]),
    "a function": set_attribute("tau_func", lambda t: 0.5),
    "the counter": set_attribute("_step_index", CHANGED - 1),
    "the counter, one on": set_attribute("_step_index", CHANGED + 1),
    "a timestep of integers": lambda scheduler, given: given.update(timestep=int(given["timestep"])),
    "forgotten kinds": lambda scheduler, given: forget(),
}


def loop(scheduler, change=None, around=contextlib.nullcontext, **options):
    """Return the results of all steps, or the error of the last one; one step differs from the others."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(STEPS)
    x, seen = randn(*SHAPE), []
    has_generator = isinstance(scheduler, (diffusers.SASolverScheduler, diffusers.EulerAncestralDiscreteScheduler))
    for number, t in enumerate(scheduler.timesteps):
        call = {"model_output": BOTH, "timestep": t, "sample": x, "guidance_scale": 7.0, **options}
        call |= {"generator": generator} if has_generator else {}
        if number == CHANGED and change is not None:
            change(scheduler, call)
        try:
            with around() if number == CHANGED else contextlib.nullcontext():
                result = scheduler.step(**call, return_dict=False)
                seen += [each.clone() for each in result]
                seen.append(result[0].is_inference())
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            return [*seen, type(error), str(error)]
        x = result[0]
    return [*seen, generator.get_state()]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.fixture
def planned(monkeypatch):
    """The steps that were planned."""
    made, runs = [], counted_step.run_counted
    monkeypatch.setattr(counted_step, "run_counted", lambda *a, **k: made.append(a[2]) or runs(*a, **k))
    return made


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_after_the_first_loops_need_no_plan(name, planned):
    scheduler, _ = pair(name, **SCHEDULERS[name])
    for _ in range(3):
        planned.clear()
        loop(scheduler)
    assert not planned


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_plan_depends_on_is_noticed(name, change, monkeypatch):
    """The results, to the bit, and the errors are those of a scheduler that plans each step."""
    scheduler, _ = pair(name, **SCHEDULERS[name])
    for _ in range(3):
        loop(scheduler)
    got = loop(scheduler, CHANGES[change])
    for function in ("follow", "repeat"):
        monkeypatch.setattr(counted_again, function, lambda *_: None)
    expected = loop(pair(name, **SCHEDULERS[name])[0], CHANGES[change])
    assert_same(got, expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_in_inference_mode_is_as_if_it_were_planned(name, monkeypatch):
    scheduler, _ = pair(name, **SCHEDULERS[name])
    for _ in range(3):
        loop(scheduler)
    got = loop(scheduler, around=torch.inference_mode)
    for function in ("follow", "repeat"):
        monkeypatch.setattr(counted_again, function, lambda *_: None)
    assert_same(got, loop(pair(name, **SCHEDULERS[name])[0], around=torch.inference_mode))


def test_a_mode_sees_the_operator_of_a_step_that_could_be_repeated():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    seen: list[str] = []
    scheduler, _ = pair("FlowMatchEulerDiscreteScheduler")
    for _ in range(3):
        loop(scheduler)
    loop(scheduler, around=Seeing)
    assert any("fastguide" in function for function in seen)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_inputs_that_are_asked_for_in_the_middle_of_a_loop_are_written_from_then_on(name):
    """Heun's steps write a second tensor as well, where they keep the sample: but not the model's input."""
    scheduler, theirs = pair(name, **BETAS)
    for _ in range(2):
        loop(scheduler)
    samples = []
    for each in (scheduler, theirs):
        each.set_timesteps(STEPS)
        x, seen = randn(*SHAPE), []
        for number, t in enumerate(each.timesteps):
            if number == 0 or number >= CHANGED:
                seen.append(each.scale_model_input(x, t).clone())
            uncond, cond = BOTH.chunk(2)
            x = each.step(uncond + 7.0 * (cond - uncond), t, x, return_dict=False)[0]
        samples.append([*seen, x])
    for got, expected in zip(*samples, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_x_0_of_a_followed_step_is_refused_once_its_output_has_changed():
    scheduler, _ = pair("EulerDiscreteScheduler", **BETAS)
    for _ in range(2):
        loop(scheduler)
    scheduler.set_timesteps(STEPS)
    x, output = randn(*SHAPE), BOTH.clone()
    for t in scheduler.timesteps[:CHANGED]:
        result = scheduler.step(output, t, x, guidance_scale=7.0)
        x = result.prev_sample
    output.mul_(2)
    with pytest.raises(RuntimeError, match="expected the inputs of its step as they were"):
        _ = result.pred_original_sample


def test_noise_that_is_drawn_and_not_used_leaves_the_generator_as_diffusers_does(planned):
    """SA-Solver draws at each step, and adds noise only where its tau says so."""
    states = []
    for each in pair("SASolverScheduler", **BETAS):
        for _ in range(3):
            planned.clear()
            generator = torch.Generator().manual_seed(5)
            each.set_timesteps(STEPS)
            x = randn(*SHAPE)
            for t in each.timesteps:
                x = each.step(BOTH[:2], t, x, generator=generator)[0]
        states.append((generator.get_state(), x))
        assert not planned
    assert torch.equal(states[0][0], states[1][0])
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-5, atol=1e-5)


def test_a_pipeline_s_guidance_of_another_output_is_not_taken_for_the_last_one_s():
    """Traced halves of an output that is no pair of predictions for the sample."""
    from fastguide.diffusers.traced import Fusion, traced

    def guided(output):
        uncond, cond = traced(output, Fusion()).chunk(2)
        return uncond + 7.0 * (cond - uncond)

    scheduler, theirs = pair("FlowMatchEulerDiscreteScheduler")
    for _ in range(3):
        scheduler.set_timesteps(STEPS)
        x = randn(*SHAPE)
        for t in scheduler.timesteps[:CHANGED]:
            x = scheduler.step(guided(BOTH), t, x, return_dict=False)[0]
    theirs.set_timesteps(STEPS)
    theirs.set_begin_index(CHANGED)
    wide = torch.cat([BOTH[:, :1], BOTH[:, :1]])[:4]  # broadcasts over the channels
    (expected,) = theirs.step(
        wide[:2] + 7.0 * (wide[2:] - wide[:2]), scheduler.timesteps[CHANGED], x, return_dict=False
    )
    got = scheduler.step(guided(wide), scheduler.timesteps[CHANGED], x, return_dict=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_steps_that_follow_or_are_refused_keep_no_references():
    scheduler, _ = pair("FlowMatchEulerDiscreteScheduler")
    x, narrow = randn(*SHAPE), BOTH.half()
    watched = (x, BOTH, narrow, scheduler._internal_dict)

    def loop_with_refusals():
        scheduler.set_timesteps(STEPS)
        y = x
        for number, t in enumerate(scheduler.timesteps):
            if number == CHANGED:
                scheduler.step(narrow, t, y, guidance_scale=7.0)
                scheduler._step_index = CHANGED
            y = scheduler.step(BOTH, t, y, guidance_scale=7.0).prev_sample

    for _ in range(4):
        loop_with_refusals()
    before = [sys.getrefcount(each) for each in watched]
    for _ in range(50):
        loop_with_refusals()
    assert [sys.getrefcount(each) for each in watched] == before
