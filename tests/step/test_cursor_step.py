"""A loop's step is repeated like others, and whoever watches sees the operator."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguide import ClassifierFree, Guidance, Sampler
from fastguide.step import cursor_step
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import TABLES

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

SHAPE = (2, 3, 4)


def draw(*shape, seed=0):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def model(x, t, condition):
    return 0.1 * x * condition[:, None, None] + 1e-3 * t[:, None, None]


def twice(x, t, condition):
    """Prediction and variance."""
    return model(x, t, condition).repeat(1, 2, 1)


def of_predictions(predictions):
    mean = predictions[1].flatten(1).mean(1)
    return torch.stack([1 - mean, mean], 1)


DDIM, DDPM, LEARNED = TABLES["ddim"], TABLES["ddpm"], TABLES["ddpm learned"]
LOOPS = {
    "guided": lambda: sampled(Sampler(model, DDIM, ClassifierFree(7.5))),
    "one call for each": lambda: sampled(Sampler(model, DDIM, ClassifierFree(7.5), batched=False)),
    "without unconditional": lambda: sampled(
        Sampler(model, DDIM, ClassifierFree.per_step([1.0, 7.5] * 5), skip_unconditional=True)
    ),
    "weights of the predictions": lambda: sampled(Sampler(model, DDIM, Guidance.from_predictions(of_predictions, 2))),
    "learned": lambda: sampled(Sampler(twice, LEARNED, ClassifierFree(7.5)), seeds=[1, 2]),
    "seeds": lambda: sampled(Sampler(model, DDPM, ClassifierFree(7.5)), seeds=[1, 2]),
    "a generator": lambda: sampled(
        Sampler(model, DDPM, ClassifierFree(7.5)), generator=torch.Generator().manual_seed(1)
    ),
    "half precision": lambda: sampled(Sampler(model, DDIM, ClassifierFree(7.5), dtype=torch.bfloat16)),
    "inpainting": lambda: sampled(
        Sampler(model, DDIM, ClassifierFree(7.5)), image=draw(seed=5), mask=draw(seed=6).gt(0).float()
    ),
    "x_0 on the way": lambda: torch.cat(
        Sampler(model, DDIM, ClassifierFree(7.5))
        .trajectory(draw(), cond=torch.ones(2), uncond=torch.zeros(2))
        .originals.unbind()
    ),
    "no guidance": lambda: Sampler(lambda x, t: 0.1 * x, DDIM)(draw()),
}


def sampled(sampler, **arguments):
    return sampler(draw(), cond=torch.ones(2), uncond=torch.zeros(2), **arguments)


@pytest.fixture
def by_operator(monkeypatch):
    """Count the steps that the operator makes."""
    counted = []
    entry = BACKENDS["native"]
    real = cursor_step.CursorStep.__init__

    def init(self, step, arguments, cursor):
        real(self, step, arguments, cursor)
        self._step = lambda *a: counted.append(1) or entry.step(*a)

    monkeypatch.setattr(cursor_step.CursorStep, "__init__", init)
    return counted


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_repeated_steps_have_the_same_bits(name, by_operator, monkeypatch):
    repeated = LOOPS[name]()
    number = len(by_operator)
    with monkeypatch.context() as patch:
        patch.setattr(cursor_step, "repeat", lambda *_: None)
        assert torch.equal(LOOPS[name](), repeated)
    assert len(by_operator) == number + 10
    expected = {"weights of the predictions": 10, "without unconditional": 3}
    assert number == expected.get(name, 2)


class SeesOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen += "fastguide.guided_step" in str(function)
        return function(*arguments, **(keywords or {}))


def test_a_mode_and_the_profiler_see_every_step():
    sampler = Sampler(model, DDIM, ClassifierFree(7.5))
    sampled(sampler)
    with SeesOperators() as mode:
        sampled(sampler)
    assert mode.seen == 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sampled(sampler)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fastguide::guided_step"] == 10


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_slots_repeat_steps_too(backend, by_operator):
    if not BACKENDS[backend].serves("cpu"):
        pytest.skip(f"{backend}: {BACKENDS[backend].status}")
    sampler = Sampler(model, DDIM, ClassifierFree(7.5), backend=backend)
    slots = sampler.slots(2)
    slot = slots.admit(draw()[:1], cond=torch.ones(1), uncond=torch.zeros(1))
    finished = {}
    while slots.active:
        finished |= slots.step()
    assert len(by_operator) == 2
    whole = Sampler(model, DDIM, ClassifierFree(7.5), backend=backend)
    expected = whole(draw()[:1], cond=torch.ones(1), uncond=torch.zeros(1))
    torch.testing.assert_close(finished[slot], expected, rtol=1e-5, atol=1e-5)
