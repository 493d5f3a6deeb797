"""Kinds of steps, each made of tensors that are new at each call; and the fixtures of tests that repeat them."""

from __future__ import annotations

import functools

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, Cursor, Inpainting
from fastguide.step import checks, repeat
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import TABLES

SHAPE = (2, 3, 4)
DDIM, DDPM, LEARNED = TABLES["ddim"], TABLES["ddpm"], TABLES["ddpm learned"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def no_kinds():
    repeat.forget()


@pytest.fixture
def checked(monkeypatch):
    """Count the steps that are checked, which are not repeated."""
    counted = []
    real = checks.validate
    monkeypatch.setattr(checks, "validate", lambda *a, **k: counted.append(1) or real(*a, **k))
    return counted


@pytest.fixture(params=["native", "triton"])
def each_backend(request, monkeypatch):
    """Name the backend in every step of a test; Triton's kernel is interpreted."""
    if not BACKENDS[request.param].serves("cpu"):
        pytest.skip(f"{request.param}: {BACKENDS[request.param].status}")
    named = functools.partial(fastguide.guided_step, backend=request.param)
    monkeypatch.setattr(fastguide, "guided_step", named)
    return request.param


NOT_TRITON = ("double precision", "many elements", "hundreds of conditions")
"""What it refuses, or takes long for in its interpreter."""


def pair(seed=1):
    return [draw(seed=seed), draw(seed=seed + 1)]


KINDS = {  # a function that makes one step, of tensors that are new at each call
    "guided": lambda: fastguide.guided_step(DDIM, 3, draw(), pair(), ClassifierFree(7.5)),
    "unguided": lambda: fastguide.guided_step(DDIM, 3, draw(), draw(seed=1)),
    "one tensor of both": lambda: fastguide.guided_step(DDIM, 3, draw(), torch.cat(pair()), GUIDANCE),
    "a tuple of four": lambda: fastguide.guided_step(DDIM, 3, draw(), (*pair(), *pair(5)), COMPOSED),
    "into an output": lambda: fastguide.guided_step(DDIM, 3, draw(), pair(), GUIDANCE, out=torch.empty(SHAPE)),
    "x_0 and a staged input": lambda: with_outputs(),
    "noise": lambda: fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, noise=draw(seed=9)),
    "a generator": lambda: fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, generator=generator()),
    "a generator that is not needed": lambda: fastguide.guided_step(
        DDPM, 9, draw(), pair(), GUIDANCE, generator=generator()
    ),
    "seeds": lambda: fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, seeds=torch.tensor([1, 2])),
    "a learned variance": lambda: fastguide.guided_step(
        LEARNED, 3, draw(), pair(), GUIDANCE, variance=draw(seed=7), noise=draw(seed=9)
    ),
    "a gradient": lambda: fastguide.guided_step(DDIM, 3, draw(), draw(seed=1), CLASSIFIER, gradient=draw(seed=2)),
    "inpainting": lambda: fastguide.guided_step(
        DDIM, 3, draw(), pair(), GUIDANCE, inpainting=Inpainting(draw().gt(0).float(), draw(seed=3), draw(seed=4))
    ),
    "mixed dtypes": lambda: fastguide.guided_step(
        DDIM, 3, draw(), [draw(seed=1, dtype=torch.bfloat16)] * 2, GUIDANCE, out=torch.empty(SHAPE, dtype=torch.float16)
    ),
    "double precision": lambda: fastguide.guided_step(DDIM, 3, draw().double(), [p.double() for p in pair()], GUIDANCE),
    "another layout": lambda: fastguide.guided_step(
        DDIM, 3, *(torch.empty(2, 4, 3).mT.copy_(draw(seed=s)) for s in (1, 2))
    ),
    "hundreds of conditions": lambda: fastguide.guided_step(DDIM, 3, draw(), [draw(seed=s) for s in range(301)], MANY),
    "samples apart": lambda: fastguide.guided_step(DDIM, 3, draw(4, 3, 4)[::2], draw(4, 3, 4, seed=1)[1::2]),
    "a cursor": lambda: with_cursor(),
    "an index for each sample": lambda: fastguide.guided_step(DDIM, torch.tensor([3, 7]), draw(), draw(seed=1)),
    "an index for all samples": lambda: fastguide.guided_step(DDIM, torch.tensor(3), draw(), draw(seed=1)),
    "a generator and an output": lambda: fastguide.guided_step(
        DDPM, 3, draw(), pair(), GUIDANCE, generator=generator(), out=torch.empty(SHAPE)
    ),
    "an output that is the sample, and a generator": lambda: in_place(),
    "a stack of five dimensions": lambda: fastguide.guided_step(DDIM, 3, draw(2, 1, 2, 3, 4), draw(2, 1, 2, 3, 4)),
    "a history": lambda: with_history(DPM),
    "a history of three slots, and an anchor": lambda: with_history(UNIPC, draw(seed=6)),
    "a history at a cursor": lambda: with_history_at_a_cursor(),
    "many elements": lambda: fastguide.guided_step(
        DDIM, 3, draw(2, 3, 200, 200), draw(4, 3, 200, 200, seed=1), GUIDANCE
    ),
}  # fmt: skip
DPM = fastguide.dpm_solver(fastguide.NoiseSchedule.linear(), 10)
UNIPC = fastguide.unipc(fastguide.NoiseSchedule.linear(), 10, solver_order=3)
MANY = Composed([0.01] * 300)
GUIDANCE, COMPOSED, CLASSIFIER = ClassifierFree(7.5), Composed([1.0, 2.0, 3.0]), Classifier(None, 2.0)
CURSOR = Cursor(timesteps=2)


def generator():
    return torch.Generator().manual_seed(5)


def in_place():
    sample = draw()
    return fastguide.guided_step(DDPM, 3, sample, pair(), GUIDANCE, generator=generator(), out=sample)


def with_outputs():
    original, staged = torch.empty(SHAPE, dtype=torch.float16), torch.empty(4, *SHAPE[1:])
    out = fastguide.guided_step(DDIM, 3, draw(), pair(), GUIDANCE, original=original, staged=staged)
    return torch.cat([out, original, staged])


def with_cursor():
    sample = draw()
    CURSOR.start(DDIM, 3)
    fastguide.guided_step(DDIM, CURSOR, sample, pair(), GUIDANCE, out=sample)
    return torch.cat([sample.flatten(), CURSOR.state.flatten(), CURSOR.timestep])


def with_history(table, anchor=None):
    """The third step, over entries that are drawn."""
    sample = draw()
    history = fastguide.History(table, sample)
    history.entries.copy_(draw(*history.entries.shape, seed=8))
    history.note(2)
    out = fastguide.guided_step(table, 3, sample, pair(), GUIDANCE, history=history, anchor=anchor)
    return torch.cat([out, history.entries])


def with_history_at_a_cursor():
    sample = draw()
    history = fastguide.History(DPM, sample)
    history.entries.copy_(draw(*history.entries.shape, seed=8))
    CURSOR.start(DPM, 3)
    fastguide.guided_step(DPM, CURSOR, sample, pair(), GUIDANCE, history=history, out=sample)
    return torch.cat([sample.flatten(), history.entries.flatten(), CURSOR.state.flatten(), CURSOR.timestep])


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_view():
    """Its pointer is not null."""
    view = draw(4, 3, 4)[2:]
    return freed(view)


def in_one(first, second):
    """Two tensors of SHAPE that share a part of their memory."""
    memory = torch.zeros(60)
    return memory[first : first + 24].view(SHAPE), memory[second : second + 24].view(SHAPE)
