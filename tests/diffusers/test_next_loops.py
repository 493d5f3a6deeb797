"""A loop that is like the last one is begun in its memory, and nothing of that one's values is left in it."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch

from fastguide.diffusers import counted_step
from fastguide.step.backends.registry import BACKENDS
from tests.support.counted_loops import BETAS
from tests.support.scheduler_pair import SHAPE, pair, randn

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

STEPS = 6
WITH_HISTORIES = {
    "LMSDiscreteScheduler": BETAS,
    "UniPCMultistepScheduler": {**BETAS, "final_sigmas_type": "zero"},
    "DEISMultistepScheduler": {**BETAS, "solver_order": 3},
    "DPMSolverMultistepScheduler": {**BETAS, "solver_order": 3},
    "IPNDMScheduler": {},
}
UNSCALED = {"EulerDiscreteScheduler": BETAS, "LMSDiscreteScheduler": BETAS, "EDMEulerScheduler": {}}


def run(scheduler, start, steps=STEPS, **options):
    """Return the samples of a loop, and what its model is given."""
    scheduler.set_timesteps(steps)
    x, samples, inputs = start, [], []
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            inputs.append(scheduler.scale_model_input(x, t))
        x = scheduler.step(torch.tanh(x), t, x, return_dict=False, **options)[0]
        samples.append(x)
    return samples, inputs


@pytest.mark.parametrize("name", WITH_HISTORIES)
def test_the_history_is_another_loop_s_memory_but_not_its_values(name, monkeypatch):
    """Slots hold what the last loop left, here NaN: a call reads none that its own loop has not written."""
    ours, theirs = pair(name, **WITH_HISTORIES[name])
    run(ours, torch.full(SHAPE, torch.nan))
    made = []
    monkeypatch.setattr(counted_step, "History", lambda *given: made.append(given))
    got, expected = run(ours, randn(*SHAPE))[0], run(theirs, randn(*SHAPE))[0]
    assert made == []
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def other_dtype(scheduler):
    return {"start": randn(*SHAPE).double()}


def other_layout(scheduler):
    return {"start": randn(*SHAPE).to(memory_format=torch.channels_last)}


def other_shape(scheduler):
    return {"start": randn(2, 4, 6, 6)}


def other_steps(scheduler):
    return {"start": randn(*SHAPE), "steps": STEPS + 1}


def other_order(scheduler):
    return {"start": randn(*SHAPE), "order": 2}


def other_configuration(scheduler):
    scheduler.register_to_config(prediction_type="v_prediction")
    return {"start": randn(*SHAPE)}


CHANGES = [other_dtype, other_layout, other_shape, other_steps, other_order, other_configuration]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_loop_that_differs_is_a_new_one(change):
    ours, theirs = pair("LMSDiscreteScheduler", **BETAS)
    for scheduler in (ours, theirs):
        run(scheduler, randn(*SHAPE))
    ended = ours._ended
    got, expected = (run(scheduler, **change(scheduler))[0] for scheduler in (ours, theirs))
    assert ours._ended is not ended
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_list_of_the_configuration_that_is_changed_in_place_is_noticed():
    ours, _ = pair("UniPCMultistepScheduler", **BETAS, disable_corrector=[0])
    run(ours, randn(*SHAPE))
    made, config = ours._ended.made, ours.config
    assert made.is_of(config, made.state)
    config.disable_corrector.append(2)
    assert not made.is_of(config, made.state)


def test_further_tables_that_are_changed_between_two_loops_are_noticed():
    ours, theirs = pair("KDPM2DiscreteScheduler", **BETAS)
    samples = []
    for scheduler in (ours, theirs):
        run(scheduler, randn(*SHAPE))
        set_timesteps = scheduler.set_timesteps

        def changed(steps, scheduler=scheduler, set_timesteps=set_timesteps):
            set_timesteps(steps)
            scheduler.sigmas_interpol = scheduler.sigmas_interpol * 1.1

        scheduler.set_timesteps = changed
        samples.append(run(scheduler, randn(*SHAPE))[0])
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNSCALED)
def test_the_first_input_of_a_later_loop_is_diffusers(name, monkeypatch):
    ours, theirs = pair(name, **UNSCALED[name])
    run(ours, randn(*SHAPE))
    expected = run(theirs, randn(*SHAPE, seed=5))[1]

    def refused(*_):
        raise AssertionError("diffusers was asked")

    for owner in type(ours).__mro__:
        if owner.__module__.startswith("diffusers.schedulers.") and "scale_model_input" in owner.__dict__:
            monkeypatch.setattr(owner, "scale_model_input", refused)
    got = run(ours, randn(*SHAPE, seed=5))[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_later_loop_with_other_sigmas_scales_by_them():
    ours, theirs = pair("EulerDiscreteScheduler", **BETAS)
    run(ours, randn(*SHAPE))
    got, expected = (run(scheduler, randn(*SHAPE), STEPS + 2)[1] for scheduler in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_loop_that_differs_lets_go_of_the_last_one_s_history():
    ours, _ = pair("LMSDiscreteScheduler", **BETAS)
    run(ours, randn(*SHAPE))
    entries = weakref.ref(ours._ended.kept_history.entries)
    ours.set_timesteps(STEPS)
    ours.scale_model_input(randn(2, 4, 6, 6), ours.timesteps[0])
    ours.step(randn(2, 4, 6, 6), ours.timesteps[0], randn(2, 4, 6, 6))
    assert entries() is None


def test_a_copy_after_a_loop_shares_no_memory():
    ours, theirs = pair("LMSDiscreteScheduler", **BETAS)
    run(ours, randn(*SHAPE))
    copied = copy.deepcopy(ours)
    assert copied._ended is None
    torch.testing.assert_close(run(copied, randn(*SHAPE))[0], run(theirs, randn(*SHAPE))[0], rtol=1e-4, atol=1e-4)


# ---- The predicted x_0 in a tuple ----


def originals(scheduler, keep):
    """Return the objects that stand for x_0 in a loop's tuples; those of the steps in ``keep`` are held meanwhile."""
    scheduler.set_timesteps(STEPS)
    x, seen, held = randn(*SHAPE), [], []
    for number, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x, original = scheduler.step(torch.tanh(x), t, x, return_dict=False)
        seen.append(id(original))
        if number in keep:
            held.append(original)
        del original
    return seen, held


def test_one_that_nobody_has_stands_for_the_next_one():
    ours, _ = pair("EulerDiscreteScheduler", **BETAS)
    originals(ours, keep=())
    seen, _ = originals(ours, keep=())
    assert len(set(seen[:-1])) == 1


def test_a_large_one_keeps_no_inputs_of_its_step_during_the_model_s_next_call():
    """Whoever drops it frees the model's output, as in diffusers; a little one may be in the next tuple."""
    ours, _ = pair("EulerDiscreteScheduler", **BETAS)
    for _ in range(2):
        ours.set_timesteps(STEPS)
        x = randn(1, 4, 260, 260)
        for t in ours.timesteps[:3]:
            ours.scale_model_input(x, t)
            output = torch.tanh(x)
            x = ours.step(output, t, x, return_dict=False)[0]
        kept = weakref.ref(output)
        del output
        assert kept() is None


def test_those_that_somebody_has_stay_what_they_are():
    ours, theirs = pair("EulerDiscreteScheduler", **BETAS)
    originals(ours, keep=())
    _, got = originals(ours, keep=(1, 2, 4))
    _, expected = originals(theirs, keep=(1, 2, 4))
    assert len({id(each) for each in got}) == 3
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one + 0, other, rtol=1e-4, atol=1e-4)


def test_one_that_was_read_is_not_used_again():
    ours, _ = pair("EulerDiscreteScheduler", **BETAS)
    originals(ours, keep=())
    ours.set_timesteps(STEPS)
    x, values = randn(*SHAPE), []
    for t in ours.timesteps:
        ours.scale_model_input(x, t)
        x, original = ours.step(torch.tanh(x), t, x, return_dict=False)
        values.append(original.clone())
        del original
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(values))
