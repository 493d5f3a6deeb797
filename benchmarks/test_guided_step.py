"""pytest-benchmark: one guided step on the CPU. ``pytest benchmarks --benchmark-only``; groups are workloads."""

from __future__ import annotations

import functools

import pytest

from .contenders import CONTENDERS, check, contenders, copy_ceiling, randn_ceiling
from .workloads import WORKLOADS, Workload


@functools.lru_cache(maxsize=1)
def made(name: str) -> Workload:
    return WORKLOADS[name]()


@pytest.mark.parametrize("contender", [*CONTENDERS, "copy_ of the same bytes"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_guided_step(benchmark, name, contender):
    workload = made(name)
    benchmark.group = f"{name}: {workload.name}"
    benchmark.extra_info["bytes"] = workload.bytes
    if contender in CONTENDERS and contender not in contenders(workload):
        pytest.skip("seeds are for steps that add noise")
    if contender in CONTENDERS:
        check(workload, contender)
    benchmark(CONTENDERS.get(contender, copy_ceiling)(workload))


def test_torch_randn_alone(benchmark):
    workload = made("small, with noise")
    benchmark.group = f"small, with noise: {workload.name}"
    benchmark(randn_ceiling(workload))
