"""pytest-benchmark: every contender on every workload. ``pytest benchmarks --benchmark-only``; groups are workloads.

``FASTGUIDE_BENCH=full`` takes the whole list. On a GPU a call is timed between two events, with the cache overwritten
and the device kept busy until the host has launched everything; on the CPU by the host's clock.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from .contenders.registry import CEILINGS, CONTENDERS, is_ours, relative_error, tolerance
from .measure.timing import Stamp, Times, host_seconds, in_turns, occupy
from .workloads import Inputs, NotRunError, full, quick

WORKLOADS = {w.title: w for w in (full() if os.environ.get("FASTGUIDE_BENCH") == "full" else quick())}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU, pytest.mark.benchmark(timer=Stamp)]),
]


@functools.lru_cache(maxsize=1)
def inputs_of(title: str, device: str) -> Inputs:
    torch._dynamo.reset()  # or torch.compile would reach its limit of recompilations
    return Inputs(WORKLOADS[title], torch.device(device))


@functools.lru_cache(maxsize=1)
def copy_of(title: str, device: str) -> float:
    """Seconds of ``copy_`` of the same bytes."""
    copy = {"copy": CEILINGS["copy_ of the same bytes"](inputs_of(title, device))}
    return in_turns(copy, 0.3, torch.device(device)).times["copy"].median


@pytest.mark.parametrize("contender", [*CONTENDERS, *CEILINGS])
@pytest.mark.parametrize("title", WORKLOADS)
@pytest.mark.parametrize("device", DEVICES)
def test_step(benchmark, device, title, contender):
    inputs = inputs_of(title, device)
    benchmark.group = f"{device}: {title}"
    benchmark.extra_info["bytes"] = inputs.bytes
    with torch.no_grad():
        try:
            call = (CONTENDERS | CEILINGS)[contender](inputs)
            result = call()
        except NotRunError as reason:
            pytest.skip(str(reason))
        except Exception as error:
            if is_ours(contender):
                raise
            pytest.skip(f"{type(error).__name__}: {error}")
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
