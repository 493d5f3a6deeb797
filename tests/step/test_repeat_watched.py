"""Whoever watches sees the operator, also where steps of a known kind would be made without it."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastguide
from fastguide.step import checks, repeat
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import TABLES

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

DDIM = TABLES["ddim"]


def draw(seed=0):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def step():
    return fastguide.guided_step(DDIM, 3, draw(), draw(seed=1))


@pytest.fixture
def checked(monkeypatch):
    """Count the steps that are checked, which are not repeated."""
    repeat.forget()
    counted = []
    real = checks.validate
    monkeypatch.setattr(checks, "validate", lambda *a, **k: counted.append(1) or real(*a, **k))
    return counted


class SeesFunctions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        SeesFunctions.seen += "guided_step" in str(function)
        return function(*arguments, **(keywords or {}))


class SeesOperators(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        SeesOperators.seen += "fastguide.guided_step" in str(function)
        return function(*arguments, **(keywords or {}))


def test_modes_see_the_operator(checked):
    for _ in range(3):
        step()
    assert len(checked) == 2
    for mode in (SeesFunctions, SeesOperators):
        mode.seen = 0
        with mode():
            step()
        assert mode.seen == 1
    step()
    assert len(checked) == 4


def test_the_profiler_sees_the_operator():
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert "fastguide::guided_step" in {event.key for event in profile.key_averages()}


def test_transforms_and_forward_mode_see_the_operator(checked):
    for _ in range(3):
        step()
    before = len(checked)
    with torch.autograd.forward_ad.dual_level():
        step()
    with pytest.raises(RuntimeError, match="alias annotations: fastguide::guided_step"):
        torch.func.functionalize(lambda x: x + step().sum())(torch.zeros(()))
    assert len(checked) == before + 2


def test_a_compiled_step_is_the_operator():
    for _ in range(3):
        expected = step()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x, p: fastguide.guided_step(DDIM, torch.tensor(3), x, p), backend=backend)
    assert torch.equal(compiled(draw(), draw(seed=1)), expected)
    assert "fastguide.guided_step" in "".join(graphs)
