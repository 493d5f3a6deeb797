"""Fixtures: a seeded generator, and each backend at each instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastguide.backends import native
from fastguide.ops import BACKENDS


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["reference", *(f"native {level}" for level in native.CAPABILITIES)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, level = request.param.partition(" ")
    if name == "reference":
        yield name
        return
    if not BACKENDS[name].devices:
        pytest.skip(f"native backend {BACKENDS[name].status}")
    before = native.cpu_capability()
    try:
        if native.set_cpu_capability(level) != level:
            pytest.skip(f"this processor has no {level}")
        yield name
    finally:
        native.set_cpu_capability(before)
