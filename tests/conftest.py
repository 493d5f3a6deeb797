"""Fixtures: a seeded generator, and each backend: at each instruction set of this machine, and the GPU's code on it."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import triton_interpreter

triton_interpreter.start()  # before anything imports fastguide, which asks at once whether Triton interprets

from fastguide.step.backends import native  # noqa: E402
from fastguide.step.backends.registry import BACKENDS, Backend  # noqa: E402
from fastguide.step.operator import THRESHOLD_WORDS, StepArguments  # noqa: E402
from fastguide.step.threads import WAITS  # noqa: E402
from tests.support import device_code, on_gpu  # noqa: E402

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(torch.get_num_threads() // PROCESSES, 1))  # the processes of one run share the cores

DEVICE_CODE = "cuda on the host"
ON_GPU = [pytest.param(f"{name} on the gpu", marks=pytest.mark.gpu) for name in ("native", "triton")]


MOST_INTERPRETED = 12_000
"""Elements of a shape up to which Triton interprets it: larger ones are for the CPU's threads, and minutes of tiles."""


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Search no garbage in the modules and tests that are collected: they are a million objects, and all stay."""
    gc.disable()
    yield
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal tests out in packets where groups of them stay together, with ``--dist loadgroup``."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from tests.support.packets import PacketScheduling  # needs xdist

    return PacketScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave large shapes to compiled kernels: they have more of the tiles that smaller ones have, and none others."""
    large = [item for item in items if _is_large_for_triton(getattr(item, "callspec", None))]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in set(large)]


def _is_large_for_triton(call: Any) -> bool:
    shape = None if call is None else call.params.get("shape")
    is_shape = isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)
    return is_shape and call.params.get("backend") == "triton" and math.prod(shape) > MOST_INTERPRETED


def _know_that_xdist_waits() -> None:
    """Let a worker of xdist draw by the library: a thread of it waits for what the main process says."""
    execnet = sys.modules.get("execnet.gateway_base")
    if execnet is not None:
        WAITS.append((execnet.Popen2IO.read.__code__, None))


_know_that_xdist_waits()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def step_of_triton(*arguments: object) -> None:
    tensors = [tensor for a in arguments for tensor in (a if isinstance(a, list) else [a])]
    if any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 for tensor in tensors):
        pytest.skip("the Triton kernel takes no float64")
    torch.ops.fastguide.guided_step_triton.default(*arguments)


def step_of_device_code(*arguments: object) -> None:
    a = StepArguments(*arguments)  # type: ignore[arg-type]
    if a.inverse_thresholds is not None:
        a = a._replace(inverse_thresholds=torch.zeros(a.sample.shape[0], THRESHOLD_WORDS))
    try:
        device_code.guided_step(*a)
    except device_code.Float64Error as error:
        pytest.skip(str(error))


@pytest.fixture(
    params=["reference", *(f"native {level}" for level in native.CAPABILITIES), DEVICE_CODE, "triton", *ON_GPU]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == DEVICE_CODE:
        if device_code.why_not() is not None:
            pytest.skip(f"the GPU's code cannot be compiled for the host: {device_code.why_not()}")
        entry = Backend(DEVICE_CODE, step_of_device_code, ("cpu",), "for tests; never a default")
        monkeypatch.setitem(BACKENDS, DEVICE_CODE, entry)
        yield DEVICE_CODE
        return
    if request.param.endswith("on the gpu"):
        name = request.param.partition(" ")[0]
        if on_gpu.NO_GPU is not None or not BACKENDS[name].serves("cuda"):
            pytest.skip(on_gpu.NO_GPU or f"{name}: {BACKENDS[name].status}")
        entry = Backend(request.param, on_gpu.StepOnGpu(BACKENDS[name].step), ("cpu",), "for tests; never a default")
        monkeypatch.setitem(BACKENDS, request.param, entry)
        yield request.param
        return
    if request.param == "triton":
        if not BACKENDS["triton"].serves("cpu"):
            pytest.skip(f"Triton is not interpreted in this process: {BACKENDS['triton'].status}")
        monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(step=step_of_triton))
        yield "triton"
        return
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
