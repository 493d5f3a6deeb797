"""``add_noise`` and ``scale_noise`` of the drop-in schedulers: diffusers' bits, errors and steps, in one pass."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from fastguide.diffusers import noising
from tests.diffusers.test_no_waiting import Note
from tests.support.scheduler_pair import diffusers, fused, pair, randn, set_steps

SHAPE = (3, 4, 8, 6)
METHODS = {
    name: next(method for method in ("add_noise", "scale_noise") if hasattr(getattr(diffusers, name), method))
    for name in fused.served.__all__
    if hasattr(getattr(diffusers, name), "add_noise") or hasattr(getattr(diffusers, name), "scale_noise")
}
LEFT = {
    "DDPMWuerstchenScheduler",  # of real timesteps, each with a level of its own
    "FlowMapEulerDiscreteScheduler",  # the same
    "FlowMatchHeunDiscreteScheduler",  # indexes by a number
    "RFD4ProteinaScheduler",  # whose levels are its timesteps
    "RePaintScheduler",  # refuses it
    "ScoreSdeVeScheduler",  # draws what is not given
}
NOISED = sorted(set(METHODS) - LEFT)
FORMULAS = {name: getattr(getattr(diffusers, name), METHODS[name]).__code__ for name in NOISED}
BY_TIMESTEP = {name for name, code in FORMULAS.items() if "alphas_cumprod" in code.co_names}
BY_COUNT = sorted(set(NOISED) - BY_TIMESTEP)
CONFIGS = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "KDPM2DiscreteScheduler": {"num_train_timesteps": 100},  # which has as many steps when it is made
    "KDPM2AncestralDiscreteScheduler": {"num_train_timesteps": 100},
}


def schedulers(name, steps=12, begin=None):
    """Return both, ready for a loop."""
    both = pair(name, **CONFIGS.get(name, {}))
    for scheduler in both:
        set_steps(scheduler, steps)
        if begin is not None:
            scheduler.set_begin_index(begin)
    return both


def noised(scheduler, x, noise, timesteps):
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x, noise, timesteps)
    return scheduler.scale_noise(x, timesteps, noise)


@pytest.fixture
def launches(monkeypatch):
    """Count those of the kernel."""
    rows, own = [], noising.guided_step

    def spy(table, row, *arguments):
        rows.append(row)
        return own(table, row, *arguments)

    monkeypatch.setattr(noising, "guided_step", spy)
    return rows


def inputs(dtype=torch.float32, seed=0):
    return randn(*SHAPE, seed=seed, dtype=dtype), randn(*SHAPE, seed=seed + 1, dtype=dtype)


def test_all_that_have_such_a_method_are_here():
    assert len(NOISED) >= 25
    assert set(METHODS) >= LEFT - set(dir(fused.served))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NOISED)
def test_diffusers_bits(name, dtype, launches):
    """The first call of a table is diffusers' own."""
    x, noise = inputs(dtype)
    ours, theirs = schedulers(name)
    t, places = ours.timesteps, [(None, None)]
    calls = [t[4:5], t[4:5], t[1:2], t[2:3].repeat(3), torch.stack([t[0], t[5], t[2]])]
    if name in BY_TIMESTEP:
        calls += [t[3], torch.tensor([0]), torch.tensor([7, 999, 7], dtype=torch.int32)]
    else:
        places += [(2, None), (2, 5)]
    for begin, index in places:
        for scheduler in (ours, theirs):
            if name in BY_COUNT:
                scheduler._begin_index, scheduler._step_index = begin, index
        counts = getattr(ours, "_step_index", None)
        for timesteps in calls:
            got, expected = (noised(each, x, noise, timesteps) for each in (ours, theirs))
            assert torch.equal(got, expected)
            assert got.dtype == dtype
        assert getattr(ours, "_step_index", None) == counts
    assert len(launches) == len(calls) * len(places) - 1


@pytest.mark.parametrize("name", NOISED)
def test_in_16_bits_it_is_rounded_once(name, launches):
    """The first call as well, so that a second run of a pipeline is like the first one."""
    x, noise = inputs(torch.bfloat16)
    ours, theirs = schedulers(name)
    for number in (4, 4, 2):
        t = ours.timesteps[number : number + 1]
        exact = noised(theirs, x.double(), noise.double(), t)
        got, expected = noised(ours, x, noise, t), noised(theirs, x, noise, t)
        assert got.dtype == expected.dtype == torch.bfloat16
        assert (got.double() - exact).norm() <= (expected.double() - exact).norm()
        assert torch.equal(got, exact.bfloat16())
    assert len(launches) == 3


VALUES = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NOISED)
def test_infinities_are_diffusers(name, dtype, launches):
    """In 16 bits those of diffusers' formula in float64, whose levels are not rounded to 0 or 1; zeros have signs."""
    exact = torch.float64 if dtype.itemsize == 2 else dtype
    pairs = torch.cartesian_prod(torch.tensor(VALUES, dtype=dtype), torch.tensor(VALUES, dtype=dtype))
    x, noise = pairs.T.reshape(2, 1, 4, 9).repeat(1, 3, 1, 1)
    ours, theirs = schedulers(name)
    t = ours.timesteps
    for timesteps in (t[4:5], t[4:5], t[:1], t[-1:], torch.stack([t[0], t[5], t[2]])):
        got, expected = noised(ours, x, noise, timesteps), noised(theirs, x.to(exact), noise.to(exact), timesteps)
        torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        known = ~expected.isnan()
        assert torch.equal(got.signbit()[known], expected.signbit()[known])
    assert len(launches) >= 4


SOME = ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]


@pytest.mark.parametrize("name", SOME)
def test_a_loop_of_inpainting(name, launches):
    """A pipeline's: it noises what is known to the next timestep after each step."""
    results = []
    for scheduler in schedulers(name, begin=3):
        (x, known), noise, latents = inputs(), randn(*SHAPE, seed=9), []
        for number, t in enumerate(scheduler.timesteps[3:-1]):
            x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
            latents.append(noised(scheduler, known, noise, scheduler.timesteps[number + 4 : number + 5]))
        results.append(torch.stack(latents))
    assert torch.equal(*results)
    assert len(launches) == len(results[0]) - 1


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_timestep_that_is_there_twice(name):
    """diffusers begins at the second of two steps that Karras' sigmas have been rounded to."""
    both = pair(name, use_karras_sigmas=True, num_train_timesteps=100)
    x, noise = inputs()
    for scheduler in both:
        scheduler.set_timesteps(60)
    ours, theirs = both
    timesteps = ours.timesteps.tolist()
    twice = [place for place, value in enumerate(timesteps) if timesteps.count(value) > 1]
    assert len(twice) > 4
    noised(ours, x, noise, ours.timesteps[:1])
    for place in twice:
        t = ours.timesteps[place : place + 1]
        assert torch.equal(noised(ours, x, noise, t), noised(theirs, x, noise, t))


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_tables_are_made_again_where_the_schedule_is_another(name, launches):
    ours, theirs = schedulers(name)
    x, noise = inputs()
    for change in (
        lambda scheduler: None,
        lambda scheduler: scheduler.set_timesteps(12),
        lambda scheduler: scheduler.set_timesteps(7),
        lambda scheduler: scheduler.alphas_cumprod.mul_(0.9),
        lambda scheduler: getattr(scheduler, "sigmas", scheduler.alphas_cumprod).mul_(0.8),
    ):
        for scheduler in (ours, theirs):
            change(scheduler)
        for _ in range(2):
            t = ours.timesteps[3:4]
            assert torch.equal(noised(ours, x, noise, t), noised(theirs, x, noise, t))
    assert len(launches) >= 6


@pytest.mark.parametrize("name", SOME)
def test_a_schedule_that_is_written_to_in_inference_mode(name):
    """torch does not count that."""
    (x, noise), pair = inputs(), schedulers(name)
    with torch.inference_mode():
        for scheduler in pair:
            scheduler.sigmas = scheduler.sigmas.clone()
        for factor in (1.0, 1.0, 0.5):
            for scheduler in pair:
                scheduler.sigmas.mul_(factor)
            assert torch.equal(*[noised(each, x, noise, each.timesteps[1:2]) for each in pair])


@pytest.mark.parametrize("name", NOISED)
def test_copies_have_no_tables(name):
    ours, theirs = schedulers(name)
    x, noise = inputs()
    t = ours.timesteps[3:4]
    for _ in range(2):
        noised(ours, x, noise, t)
    copied = copy.deepcopy(ours)
    assert copied._noisings is None
    assert torch.equal(noised(copied, x, noise, t), noised(theirs, x, noise, t))


BAD = {
    "a timestep of Python's": lambda x, noise, t: (x, noise, 7),
    "a sample of Python's": lambda x, noise, t: (1.0, noise, t[:1]),
    "two timesteps of three": lambda x, noise, t: (x, noise, t[:2]),
    "no timestep": lambda x, noise, t: (x, noise, t[:0]),
    "one that is not there": lambda x, noise, t: (x, noise, torch.tensor([12345])),
    "noise of another shape": lambda x, noise, t: (x, noise[:, :, :5], t[:1]),
    "no noise": lambda x, noise, t: (x, None, t[:1]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", *SOME])
def test_bad_input_is_diffusers_error(name, case):
    x, noise = inputs()
    answers = []
    for scheduler in schedulers(name):
        for _ in range(2):
            noised(scheduler, x, noise, scheduler.timesteps[:1])
        try:
            answers.append(noised(scheduler, *BAD[case](x, noise, scheduler.timesteps)))
        except Exception as error:
            answers.append((type(error), str(error)))
    if type(answers[1]) is torch.Tensor:  # of a timestep that is not there, some take the last step
        assert (name, case) == ("DPMSolverMultistepScheduler", "one that is not there")
        assert torch.equal(*answers)
    else:
        assert answers[0] == answers[1]


OTHERS = {
    "noise that broadcasts": lambda x, noise, t: (x, noise[:1], t[:1]),
    "noise of another dtype": lambda x, noise, t: (x, noise.double(), t[:1]),
    "other strides": lambda x, noise, t: (x.to(memory_format=torch.channels_last), noise, t[:1]),
    "a view": lambda x, noise, t: (x[:, 1:3], noise[:, 1:3], t[:1]),
    "three timesteps of one sample": lambda x, noise, t: (x[:1], noise[:1], t[:3]),
    "empty": lambda x, noise, t: (x[:0], noise[:0], t[:1]),
    "a parameter": lambda x, noise, t: (x.clone().requires_grad_(), noise, t[:1]),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("name", ["DDIMScheduler", *SOME])
def test_what_is_not_served_is_diffusers(name, case, launches):
    x, noise = inputs()
    results = []
    for scheduler in schedulers(name):
        for _ in range(2):
            noised(scheduler, x, noise, scheduler.timesteps[:1])
        results.append(noised(scheduler, *OTHERS[case](x, noise, scheduler.timesteps)))
    assert len(launches) == 1
    assert torch.equal(*results)
    assert results[0].dtype == results[1].dtype
    assert results[0].stride() == results[1].stride()
    assert results[0].requires_grad == results[1].requires_grad


def test_vmap_and_inference_mode():
    ours, theirs = schedulers("DDIMScheduler")
    x, noise = inputs()
    for _ in range(2):
        noised(ours, x, noise, ours.timesteps[:1])
    t = torch.tensor([3, 5, 7])
    got, expected = (torch.func.vmap(each.add_noise)(x, noise, t) for each in (ours, theirs))
    assert torch.equal(got, expected)
    with torch.inference_mode():
        got = noised(ours, x, noise, t)
        assert got.is_inference()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NOISED)
def test_timesteps_of_a_device_are_not_read(name):
    ours, theirs = schedulers(name)
    x, noise = inputs()
    expected = noised(theirs, x, noise, theirs.timesteps[3:4])
    noised(ours, x, noise, ours.timesteps[3:4])
    ours.set_timesteps(12, device="meta")
    note = Note()
    assert torch.equal(noised(ours, x, noise, ours.timesteps[3:4]), expected)
    with note:
        assert torch.equal(noised(ours, x, noise, ours.timesteps[3:4]), expected)
    assert any(each.startswith("fastguide::") for each in note.names)
    assert note.waits() == ["aten::equal"]


def test_signatures_are_diffusers():
    for name, method in METHODS.items():
        own, theirs = (inspect.signature(getattr(getattr(module, name), method)) for module in (fused, diffusers))
        assert list(own.parameters) == list(theirs.parameters)
