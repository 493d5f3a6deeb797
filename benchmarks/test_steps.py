"""Time every contender on every workload with pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Each workload is a group; ``FASTGUIDE_BENCH=full`` takes all workloads. On the CPU a call is timed by the clock. On a
GPU it is timed between two events, after the cache was overwritten, and with the device kept busy until the host has
launched everything.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

from .contenders.correctness import relative_error, tolerance
from .contenders.registry import CEILINGS, CONTENDERS, is_ours
from .measure.timing import Stamp, Times, host_seconds, in_turns, occupy
from .workloads import Inputs, NotRunError, full, quick

WORKLOADS = {w.title: w for w in (full() if os.environ.get("FASTGUIDE_BENCH") == "full" else quick())}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU, pytest.mark.benchmark(timer=Stamp)]),
]


@functools.lru_cache(maxsize=1)
def inputs_of(title: str, device: str) -> Inputs:
    """Return the tensors of a workload; they are made once."""
    torch._dynamo.reset()  # otherwise torch.compile would reach its limit of recompilations
    return Inputs(WORKLOADS[title], torch.device(device))


@functools.lru_cache(maxsize=1)
def copy_of(title: str, device: str) -> float:
    """Return the seconds of ``copy_`` of the same bytes."""
    copy = {"copy": CEILINGS["copy_ of the same bytes"](inputs_of(title, device))}
    return in_turns(copy, 0.3, torch.device(device)).times["copy"].median


@pytest.mark.parametrize("contender", [*CONTENDERS, *CEILINGS])
@pytest.mark.parametrize("title", WORKLOADS)
@pytest.mark.parametrize("device", DEVICES)
def test_step(benchmark: Any, device: str, title: str, contender: str) -> None:
    inputs = inputs_of(title, device)
    benchmark.group = f"{device}: {title}"
    benchmark.extra_info["bytes"] = inputs.bytes
    with torch.no_grad():
        try:
            call = (CONTENDERS | CEILINGS)[contender](inputs)
            result = call()
        except NotRunError as reason:
            pytest.skip(str(reason))
        except Exception as failure:
            if is_ours(contender):
                raise
            pytest.skip(f"{type(failure).__name__}: {failure}")
        if contender in CONTENDERS:
            error = relative_error(inputs, contender, result)
            assert error < tolerance(inputs, contender), f"relative error {error:.1e}"
        del result
        if device == "cpu":
            benchmark(call)
        else:
            host = host_seconds(call, inputs.device)
            benchmark.pedantic(call, setup=lambda: occupy(host), rounds=100, warmup_rounds=3)
    if benchmark.stats is None:  # with --benchmark-disable
        return
    times = Times.of(benchmark.stats.stats.data)
    share = copy_of(title, device) / times.median
    benchmark.extra_info |= {"p10": times.low, "p90": times.high, "share_of_copy": share}
