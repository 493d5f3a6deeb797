"""``batch_step_no_noise`` of the parallel schedulers, one row for each sample, beside diffusers' own."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.scheduler_pair import model, pair, randn

SHAPE = (5, 3, 8, 8)
CASES = [
    ("DDIMParallelScheduler", {}, {}),
    ("DDIMParallelScheduler", {"set_alpha_to_one": False, "prediction_type": "v_prediction"}, {}),
    ("DDIMParallelScheduler", {"clip_sample_range": 0.5}, {"use_clipped_model_output": True}),
    ("DDIMParallelScheduler", {"prediction_type": "sample"}, {}),
    ("DDPMParallelScheduler", {}, {}),
    ("DDPMParallelScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
]


def steps(scheduler, options, double=False, steps=7):
    scheduler.set_timesteps(steps)
    timesteps, x = scheduler.timesteps[[0, 3, 6, 2, 6]], randn(*SHAPE)
    output = model(x, timesteps.view(-1, 1, 1, 1))
    output = torch.cat([output, output], 1) if double else output
    return scheduler.batch_step_no_noise(output, timesteps, x, **options)


@pytest.mark.parametrize(("name", "config", "options"), CASES)
def test_batches_are_diffusers(name, config, options):
    ours, theirs = pair(name, **config)
    expected = steps(theirs, options)
    torch.testing.assert_close(steps(ours, options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_is_not_used(variance_type):
    ours, theirs = pair("DDPMParallelScheduler", variance_type=variance_type)
    torch.testing.assert_close(steps(ours, {}, True), steps(theirs, {}, True), rtol=1e-5, atol=1e-6)


def test_ddpm_without_timesteps_leads_to_the_one_before():
    x, timesteps = randn(*SHAPE), torch.tensor([999, 500, 1, 0, 3])
    ours, theirs = (s.batch_step_no_noise(model(x, 5), timesteps, x) for s in pair("DDPMParallelScheduler"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler"])
def test_no_operation_of_torch_is_left_in_it(name):
    """But those that allocate, and views."""
    scheduler, _ = pair(name)
    scheduler.set_timesteps(7)
    x, timesteps = randn(*SHAPE), scheduler.timesteps[[0, 3, 6, 2, 6]]
    scheduler.batch_step_no_noise(x, timesteps, x)
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Note():
        scheduler.batch_step_no_noise(x, timesteps, x)
    computes = [name for name in seen if not name.startswith(("fastguide", "aten.empty", "aten.detach"))]
    assert any(name.startswith("fastguide") for name in seen)
    assert not [name for name in computes if any(word in name for word in ("mul", "add", "sub", "div", "pow", "where"))]


def test_the_step_itself_is_as_it_was():
    ours, theirs = pair("DDIMParallelScheduler")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    x, t = randn(*SHAPE), ours.timesteps[2]
    ours.batch_step_no_noise(x, t.expand(5), x)
    got, expected = (s.step(x, t, x).prev_sample for s in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_eta_is_refused_as_diffusers_does():
    scheduler, _ = pair("DDIMParallelScheduler")
    scheduler.set_timesteps(7)
    with pytest.raises(AssertionError):
        scheduler.batch_step_no_noise(randn(*SHAPE), scheduler.timesteps[[0] * 5], randn(*SHAPE), eta=1.0)
