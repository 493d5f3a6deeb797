"""pytest-benchmark: one guided step on the CPU. ``pytest benchmarks --benchmark-only``; groups are workloads."""

from __future__ import annotations

import pytest

from .contenders import CONTENDERS, check, copy_ceiling, randn_ceiling
from .workloads import SMALL_NOISY, WORKLOADS


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_guided_step(benchmark, workload, name):
    check(workload, name)
    benchmark.group = workload.name
    benchmark.extra_info["bytes"] = workload.bytes
    benchmark(CONTENDERS[name](workload))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_copy_of_the_same_bytes(benchmark, workload):
    benchmark.group = workload.name
    benchmark(copy_ceiling(workload))


def test_torch_randn_alone(benchmark):
    benchmark.group = SMALL_NOISY.name
    benchmark(randn_ceiling(SMALL_NOISY))
