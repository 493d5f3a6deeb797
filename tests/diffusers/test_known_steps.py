"""A scheduler's step like its last one is not planned again: with the same results, refusals, noise and counts."""

from __future__ import annotations

import copy
import pickle
import random

import diffusers
import pytest
import torch

import fastguide.diffusers as fused
from fastguide.step.backends.registry import BACKENDS

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

SHAPE, STEPS = (2, 4, 6, 5), 10
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, ONE, BOTH = randn(*SHAPE), randn(*SHAPE, seed=1), randn(4, 4, 6, 5, seed=2)
GRAD = ONE.clone().requires_grad_()


def generator():
    return torch.Generator().manual_seed(3)


def given(**arguments):
    return arguments


CALLS = {  # arguments of step, made anew each time
    "guided": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=7.5),
    "another scale": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=3.0),
    "a scale of an int": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=3),
    "a scale for each": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=[2.0, 3.0]),
    "a scale of 1": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=1.0),
    "a tensor of scales": lambda s: given(
        model_output=BOTH, timestep=s.timesteps[3], guidance_scale=torch.tensor([2.0, 3.0])
    ),
    "a scale that is a bool": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=True),
    "another timestep": lambda s: given(model_output=BOTH, timestep=s.timesteps[5], guidance_scale=7.5),
    "a number for a timestep": lambda s: given(model_output=BOTH, timestep=int(s.timesteps[5]), guidance_scale=7.5),
    "the last timestep": lambda s: given(model_output=BOTH, timestep=s.timesteps[-1], guidance_scale=7.5),
    "a timestep for each": lambda s: given(model_output=BOTH, timestep=s.timesteps[3:5], guidance_scale=7.5),
    "a timestep of one element": lambda s: given(model_output=BOTH, timestep=s.timesteps[3:4], guidance_scale=7.5),
    "a timestep of float": lambda s: given(model_output=BOTH, timestep=torch.tensor(300.0), guidance_scale=7.5),
    "a timestep of int32": lambda s: given(model_output=BOTH, timestep=s.timesteps[3].int(), guidance_scale=7.5),
    "a timestep that is a bool": lambda s: given(model_output=BOTH, timestep=True, guidance_scale=7.5),
    "a timestep beyond all": lambda s: given(model_output=BOTH, timestep=1000, guidance_scale=7.5),
    "a timestep that is not set": lambda s: given(model_output=BOTH, timestep=301, guidance_scale=7.5),
    "a negative timestep": lambda s: given(model_output=BOTH, timestep=-1, guidance_scale=7.5),
    "unguided": lambda s: given(model_output=ONE, timestep=s.timesteps[3]),
    "one that should be doubled": lambda s: given(model_output=ONE, timestep=s.timesteps[3], guidance_scale=7.5),
    "one that should not": lambda s: given(model_output=BOTH, timestep=s.timesteps[3]),
    "half precision": lambda s: given(
        model_output=BOTH.half(), sample=X.half(), timestep=s.timesteps[3], guidance_scale=7.5
    ),
    "a wider output": lambda s: given(model_output=BOTH, sample=X.half(), timestep=s.timesteps[3], guidance_scale=7.5),
    "a narrower output": lambda s: given(model_output=BOTH.half(), timestep=s.timesteps[3], guidance_scale=7.5),
    "double precision": lambda s: given(model_output=ONE.double(), timestep=s.timesteps[3]),
    "channels last": lambda s: given(
        model_output=ONE, sample=X.contiguous(memory_format=torch.channels_last), timestep=s.timesteps[3]
    ),
    "an expanded output": lambda s: given(model_output=ONE[:1].expand(SHAPE), timestep=s.timesteps[3]),
    "autograd": lambda s: given(model_output=GRAD, timestep=s.timesteps[3]),
    "inference": lambda s: given(model_output=inference(ONE), timestep=s.timesteps[3]),
    "a gradient": lambda s: given(model_output=ONE, timestep=s.timesteps[3], gradient=X),
    "a gradient's scale alone": lambda s: given(model_output=ONE, timestep=s.timesteps[3], gradient_scale=2.0),
    "scales of no gradient": lambda s: given(model_output=ONE, timestep=s.timesteps[3], gradient_scale=torch.ones(2)),
    "a tuple": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=7.5, return_dict=False),
    "a list of one generator": lambda s: given(model_output=ONE, timestep=s.timesteps[3], generator=[generator()]),
    "a list of generators": lambda s: given(
        model_output=ONE, timestep=s.timesteps[3], generator=[generator(), generator()]
    ),
    "no generator": lambda s: given(model_output=ONE, timestep=s.timesteps[3], generator=None),
    "no tensor": lambda s: given(model_output=None, timestep=s.timesteps[3]),
    "a sample that is none": lambda s: given(model_output=ONE, timestep=s.timesteps[3], sample=[1.0]),
}  # fmt: skip
ETAS = {
    "eta": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=7.5, eta=0.5),
    "eta at the last step": lambda s: given(model_output=BOTH, timestep=s.timesteps[-1], guidance_scale=7.5, eta=0.5),
    "eta of 1": lambda s: given(model_output=BOTH, timestep=s.timesteps[3], guidance_scale=7.5, eta=1),
    "eta beyond 1": lambda s: given(model_output=ONE, timestep=s.timesteps[3], eta=1.5),
    "the clipped output": lambda s: given(model_output=ONE, timestep=s.timesteps[3], use_clipped_model_output=True),
    "noise": lambda s: given(model_output=ONE, timestep=s.timesteps[3], eta=0.5, variance_noise=X, generator=None),
}  # fmt: skip


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def scheduler_of(name):
    scheduler = getattr(fused, name)()
    scheduler.set_timesteps(STEPS)
    return scheduler


def outcome(scheduler, call):
    """Return the result, x_0, and where the generators are afterwards; or what was refused."""
    torch.manual_seed(4)
    arguments = {"sample": X, "generator": generator()} | call(scheduler)
    own = arguments["generator"]
    try:
        done = scheduler.step(**arguments)
    except Exception as error:  # whatever is raised, has to be raised alike
        return type(error), str(error)
    values = list(done) if isinstance(done, tuple) else [done.prev_sample, done.pred_original_sample]
    states = [each.get_state() for each in (own if isinstance(own, list) else [own]) if each is not None]
    return [*(value.detach() for value in values), *states, torch.get_rng_state()]


def same(got, expected):
    if isinstance(got, tuple) or isinstance(expected, tuple):
        return got == expected
    return len(got) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_step_after_any_others_is_that_of_a_new_scheduler(name, seed):
    calls = CALLS | ETAS if name == "DDIMScheduler" else CALLS
    scheduler = scheduler_of(name)
    expected = {key: outcome(scheduler_of(name), call) for key, call in calls.items()}
    order = random.Random(seed).choices(list(calls), k=300)
    for key in order:
        for _ in range(random.Random(key + str(seed)).choice([1, 4])):
            got = outcome(scheduler, calls[key])
            assert same(got, expected[key]), key


CHANGES = {
    "other timesteps": lambda s: s.set_timesteps(2 * STEPS),
    "the configuration": lambda s: s.register_to_config(clip_sample=False),
    "its schedule, replaced": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.9),
    "its schedule, in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "thresholding": lambda s: s.register_to_config(thresholding=True),
    "its timesteps, in place": lambda s: s.timesteps.sub_(1),
    "a copy": lambda s: copy.deepcopy(s),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_changed_plans_anew(name, change):
    warm, new = scheduler_of(name), scheduler_of(name)
    for _ in range(4):
        outcome(warm, CALLS["guided"])
    for scheduler in (warm, new):
        CHANGES[change](scheduler)
    for _ in range(4):
        assert same(outcome(warm, CALLS["guided"]), outcome(new, CALLS["guided"]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_are_planned_twice(name, device, monkeypatch):
    """Also with timesteps that the host cannot read, as those on a GPU: it knows them by their place."""
    planned = []
    real = fused.schedulers.plan
    monkeypatch.setattr(fused.schedulers, "plan", lambda *a, **k: planned.append(1) or real(*a, **k))
    theirs = getattr(diffusers, name)()
    theirs.set_timesteps(STEPS)
    scheduler = scheduler_of(name)
    scheduler.set_timesteps(STEPS, device=device)
    x = y = X
    for t, there in zip(theirs.timesteps, scheduler.timesteps, strict=True):
        ours = scheduler.step(torch.cat([x, 0.1 * x]), there, x, generator=generator(), guidance_scale=2.0)
        x = ours.prev_sample
        combined = y + 2.0 * (0.1 * y - y)
        y = theirs.step(combined, t, y, generator=generator()).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    # DDPM's last timestep, which adds no noise, is another kind
    assert len(planned) == (2 if name == "DDIMScheduler" else 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_of_a_scheduler_that_has_made_steps(copied):
    scheduler = scheduler_of("DDPMScheduler")
    first, *_ = [outcome(scheduler, CALLS["guided"]) for _ in range(4)]
    other = copied(scheduler)
    assert other._last_plan is None
    for _ in range(4):
        assert same(outcome(other, CALLS["guided"]), first)


def test_an_original_that_is_read_late_is_refused_once_its_inputs_have_changed():
    scheduler = scheduler_of("DDIMScheduler")
    for _ in range(4):
        x = X.clone()
        done = scheduler.step(ONE, scheduler.timesteps[3], x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="expected the inputs of its step as they were"):
        _ = done.pred_original_sample
