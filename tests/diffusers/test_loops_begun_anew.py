"""A loop like the last one begins without a plan, and with one where anything is not as it was."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers import counted_step
from tests.support.scheduler_pair import SHAPE, pair, randn, steps_of

FLOW = "FlowMatchEulerDiscreteScheduler"
CASES = {
    "goes on from its sample alone": FLOW,
    "has a predicted x_0": "EulerDiscreteScheduler",
    "has a history": "DPMSolverMultistepScheduler",
    "corrects samples": "UniPCMultistepScheduler",
    "draws noise": "EulerAncestralDiscreteScheduler",
}


def loop(scheduler, begin=0, shape=SHAPE, dtype=torch.float32, edit=None, take=lambda t: t):
    """Return every sample of a loop."""
    x, generator = randn(*shape).to(dtype), torch.Generator().manual_seed(0)
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    scheduler.is_scale_input_called = True
    found = []
    for place, t in enumerate(steps_of(scheduler)):
        if place < begin:
            continue
        if place == edit:
            x.mul_(0.5)
        x = scheduler.step(torch.tanh(x), take(t), x, return_dict=False, **options)[0]
        found.append(x.clone())
    return torch.stack(found)


def warmed(name, loops=2, **config):
    """Return both schedulers, of which ours has made loops."""
    ours, theirs = pair(name, **config)
    for _ in range(loops):
        ours.set_timesteps(6)
        loop(ours)
    return ours, theirs


def both(ours, theirs, change=lambda scheduler: None, steps=6, **how):
    """Return the samples of another loop of each."""
    found = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
        change(scheduler)
        found.append(loop(scheduler, **how))
    return found


@pytest.fixture
def planned(monkeypatch):
    """Return the calls of a loop that were planned, and the steps whose loop was looked for."""
    calls, runs, finds = [], counted_step.run_counted, counted_step.loop_at
    monkeypatch.setattr(counted_step, "run_counted", lambda *a, **k: calls.append(a[2]) or runs(*a, **k))
    monkeypatch.setattr(counted_step, "loop_at", lambda *a: calls.append(f"of {a[1]}") or finds(*a))
    return calls


@pytest.mark.parametrize("begin_index", [None, 0])
@pytest.mark.parametrize("case", CASES)
def test_no_step_is_planned_if_the_loop(case, begin_index, planned):
    ours, theirs = warmed(CASES[case])
    planned.clear()
    got, expected = both(ours, theirs, lambda s: None if begin_index is None else s.set_begin_index(begin_index))
    assert not planned
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("take", [torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.flatten, float])
def test_the_first_timestep_is_known_by_its_value(take, planned, monkeypatch):
    """Of a view, a copy, and a number; diffusers is asked for its step in the first loop alone."""
    ours, theirs = pair(FLOW)
    asked, finds = [], type(ours).index_for_timestep
    monkeypatch.setattr(type(ours), "index_for_timestep", lambda self, *a: asked.append(a) or finds(self, *a))
    for _ in range(2):
        ours.set_timesteps(6)
        loop(ours, take=take)
    assert len(asked) == 1
    planned.clear()
    got, expected = both(ours, theirs, take=take)
    assert not planned
    assert len(asked) == 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


CHANGES = {
    "begins later": {"begin": 2},
    "has other samples": {"shape": (1, 3, 4, 4)},
    "has samples of 16 bits": {"dtype": torch.bfloat16},
    "has another number of steps": {"steps": 5},
    "has sigmas that were written to": {"change": lambda s: s.sigmas.mul_(0.9)},
    "has other sigmas": {"change": lambda s: setattr(s, "sigmas", s.sigmas * 0.9)},
    "has a sample that is edited": {"edit": 3},
    "has a first sample that is edited": {"edit": 0},
}


@pytest.mark.parametrize("name", [FLOW, "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_loop_is_right_that(case, name):
    check_a_changed_loop(name, CHANGES[case])


def test_a_loop_of_timesteps_that_were_written_to_is_right():
    """Of a flow, whose timesteps may be any numbers."""
    check_a_changed_loop(FLOW, {"change": lambda s: s.timesteps.mul_(0.5)})


def check_a_changed_loop(name, how):
    """Check it, and one like the first, after it."""
    ours, theirs = warmed(name)
    new, _ = pair(name)
    got, of_a_new_one = both(ours, new, **how)
    assert got.dtype == of_a_new_one.dtype
    assert torch.equal(got, of_a_new_one)
    if how.get("dtype") is None:  # diffusers rounds samples of 16 bits
        _, expected = both(new, theirs, **how)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    again, as_before = both(ours, theirs)
    torch.testing.assert_close(again, as_before, rtol=1e-5, atol=1e-5)


def test_a_configuration_that_was_changed_is_noticed():
    ours, theirs = warmed("EulerDiscreteScheduler")
    got, expected = both(ours, theirs, lambda s: s.register_to_config(prediction_type="v_prediction"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [0, 3])
def test_whole_numbers_are_refused_in_a_later_loop(at):
    ours, theirs = warmed(FLOW)
    x = randn(*SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
        y = x
        for t in scheduler.timesteps[:at]:
            y = scheduler.step(y, t, y, return_dict=False)[0]
        with pytest.raises(ValueError, match="integer indices"):
            scheduler.step(y, at, y)


def test_stochastic_steps_leave_the_generator_as_diffusers_do():
    """At the last of them too, which draws noise that it does not use."""
    ours, theirs = pair(FLOW, stochastic_sampling=True)
    for _ in range(3):
        states = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(6)
            x, generator = randn(*SHAPE), torch.Generator().manual_seed(0)
            for t in scheduler.timesteps:
                x = scheduler.step(torch.tanh(x), t, x, generator=generator, return_dict=False)[0]
            states += [generator.get_state(), x]
        assert torch.equal(states[0], states[2])
        torch.testing.assert_close(states[1], states[3], rtol=1e-5, atol=1e-5)


def test_each_loop_without_scaled_inputs_is_warned_of(monkeypatch):
    from diffusers.utils import logging

    warned = []
    ours, _ = pair("EulerDiscreteScheduler")
    logger = logging.get_logger(type(ours).__module__)
    monkeypatch.setattr(logger, "warning", lambda text: warned.append(text))
    for number in range(3):
        ours.set_timesteps(6)
        x = randn(*SHAPE)
        for t in ours.timesteps:
            x = ours.step(torch.tanh(x), t, x, return_dict=False)[0]
        assert len(warned) == number + 1
    assert all("scale_model_input: expected to be called before each step" in text for text in warned)


def test_a_loop_in_inference_mode_plans_its_first_step(planned):
    """As torch does not count who writes to its first sample."""
    ours, theirs = warmed(FLOW)
    for _ in range(3):
        planned.clear()
        with torch.inference_mode():
            got, expected = both(ours, theirs)
        torch.testing.assert_close(got.clone(), expected.clone(), rtol=1e-5, atol=1e-5)
    assert planned == ["of 0", 0]
    got, expected = both(ours, theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_first_sample_in_another_dtype_than_those_after_it_is_planned():
    """The model's output is in float32, as are the samples that diffusers returns for it."""
    ours, theirs = pair(FLOW)
    for _ in range(4):
        found = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(6)
            x = randn(*SHAPE).bfloat16()
            for t in scheduler.timesteps:
                x = scheduler.step(torch.tanh(x.float()), t, x, return_dict=False)[0]
                assert x.dtype == torch.float32
            found.append(x)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_loops_over_samples_of_two_shapes_take_turns(case):
    """A sample is edited in their middle, whose step is planned."""
    ours, theirs = warmed(CASES[case])
    for turn in range(6):
        got, expected = both(ours, theirs, shape=(1, 3, 4, 4) if turn % 2 else SHAPE, edit=3 if turn > 3 else None)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_refused_first_step_leaves_the_last_loop_to_begin_with(planned):
    """A model's output of another dtype is planned, and the loop after it is made as the ones before."""
    ours, _ = warmed(FLOW)
    ours.set_timesteps(6)
    first = ours.step(randn(*SHAPE).double(), ours.timesteps[0], randn(*SHAPE), return_dict=False)[0]
    assert first.dtype == torch.float64
    ours.set_timesteps(6)
    with pytest.raises(ValueError, match="model_output: expected the sample's batch"):
        ours.step(randn(4, 3, 8, 8), ours.timesteps[0], randn(*SHAPE))
    ours.set_timesteps(6)
    loop(ours)
    planned.clear()
    ours.set_timesteps(6)
    loop(ours)
    assert not planned
