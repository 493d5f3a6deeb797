"""pytest-benchmark: every contender on every workload. ``pytest benchmarks --benchmark-only``; groups are workloads.

``FASTGUIDE_BENCH=full`` takes the whole list. On a GPU a round is between events of an idle device.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from fastguide.bench.contenders import CEILINGS, CONTENDERS, NotRunError, relative_error, tolerance
from fastguide.bench.workloads import Inputs, full, quick

WORKLOADS = {w.title: w for w in (full() if os.environ.get("FASTGUIDE_BENCH") == "full" else quick())}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@functools.lru_cache(maxsize=1)
def inputs_of(title: str, device: str) -> Inputs:
    return Inputs(WORKLOADS[title], torch.device(device))


@pytest.mark.parametrize("contender", [*CONTENDERS, *CEILINGS])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("title", WORKLOADS)
def test_step(benchmark, title, device, contender):
    inputs = inputs_of(title, device)
    benchmark.group = f"{title} on {device}"
    benchmark.extra_info["bytes"] = inputs.bytes
    try:
        call = (CONTENDERS | CEILINGS)[contender](inputs)
    except NotRunError as reason:
        pytest.skip(str(reason))
    with torch.no_grad():
        if contender in CONTENDERS:
            error = relative_error(inputs, contender, call())
            assert error < tolerance(inputs, contender), f"relative error {error:.1e}"
        if device == "cpu":
            benchmark(call)
            return

        def finished() -> None:
            call()
            torch.cuda.synchronize()

        benchmark(finished)
