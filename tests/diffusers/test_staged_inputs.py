"""The model's input of the very sample that a step returned is written by that step; all other inputs are computed."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, pair, randn, set_steps

NAMES = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
    "CMStochasticIterativeScheduler",
)


def loop(scheduler, given=lambda x: x, edit=lambda x, number: x, dtype=torch.float32):
    """Return the model's inputs; ``given``: what of a sample they are asked for."""
    set_steps(scheduler, 6)
    x, inputs = (randn(*SHAPE) * float(scheduler.init_noise_sigma)).to(dtype), []
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for number, t in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(given(x), t))
        output = torch.tanh(inputs[-1][: len(x)])
        x = edit(scheduler.step(output, t, x, return_dict=False, **options)[0], number)
    return inputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_are_diffusers(name, mode):
    ours, theirs = pair(name)
    with mode():
        expected = loop(theirs)
        for _ in range(3):  # the first loop is asked, the second writes them, the third repeats that
            staged = []
            for got, wanted in zip(loop(ours, edit=noting(ours, staged)), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    assert staged[:-1] == [not keeps for keeps in ours._counted.made.keeps[:-1]]
    assert any(staged)


def noting(scheduler, staged):
    """Return a callback that notes whether a step has written the model's next input."""

    def note(x, number):
        staged.append(scheduler._counted.staged is not None)
        return x

    return note


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_inputs_of_other_samples_are_computed(name):
    """Of doubled ones, as pipelines have them, of copies, and of those that were edited in place or replaced."""
    for given in (lambda x: torch.cat([x, x]), torch.clone):
        ours, theirs = pair(name)
        for _ in range(2):
            for got, wanted in zip(loop(ours, given), loop(theirs, given), strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
        assert not ours._counted.made.staging
    for edit in (lambda x, n: x.mul_(0.9) if n == 2 else x, lambda x, n: x * 0.9 if n == 2 else x):
        ours, theirs = pair(name)
        for _ in range(3):
            for got, wanted in zip(loop(ours, edit=edit), loop(theirs, edit=edit), strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_a_rounded_sample_s_input_is_computed():
    ours, theirs = pair("EulerDiscreteScheduler")
    staged = []
    for _ in range(3):
        got_inputs = loop(ours, dtype=torch.bfloat16, edit=noting(ours, staged))
        for got, wanted in zip(got_inputs, loop(theirs, dtype=torch.bfloat16), strict=True):
            assert got.dtype == torch.bfloat16
            assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert not any(staged)


def test_no_operation_of_torch_scales_it(monkeypatch):
    ours, _ = pair("EulerDiscreteScheduler")
    for _ in range(2):
        loop(ours)
    monkeypatch.setattr("diffusers.EulerDiscreteScheduler.scale_model_input", None)
    ours.set_timesteps(6)
    ours._step_index, x = 0, randn(*SHAPE)
    x = ours.step(torch.tanh(x), ours.timesteps[0], x, return_dict=False)[0]
    staged = ours._counted.staged
    assert ours.scale_model_input(x, ours.timesteps[1]) is staged
    again = ours.scale_model_input(x, ours.timesteps[1])
    assert again is not staged, "what was handed out may have been written to"
    torch.testing.assert_close(again, staged)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler"])
@pytest.mark.parametrize("given", [False, True])
def test_inputs_that_are_not_scaled_are_warned_of_once_a_loop(name, given, caplog, monkeypatch):
    scheduler, theirs = pair(name)
    logger = logging.getLogger(type(theirs).__module__)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    for scales in (False, True):
        caplog.clear()
        scheduler.set_timesteps(4)
        x = randn(*SHAPE)
        options = {"pred_original_sample": 0.5 * x} if given and name == "EDMEulerScheduler" else {}
        for t in scheduler.timesteps[:3]:
            if scales:
                scheduler.scale_model_input(x, t)
            x = scheduler.step(0.1 * x, t, x, return_dict=False, **options)[0]
        assert ["scale_model_input" in message for message in caplog.messages] == ([] if scales else [True])
