"""pytest-benchmark: every contender on every workload. ``pytest benchmarks --benchmark-only``; groups are workloads.

``FASTGUIDE_BENCH=full`` takes the whole list. Of the CPU: host timers say nothing of a GPU's work, which ``fastguide
bench --device cuda`` times between events.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from fastguide.bench.contenders import CEILINGS, CONTENDERS, NotRunError, is_ours, relative_error, tolerance
from fastguide.bench.workloads import Inputs, full, quick

WORKLOADS = {w.title: w for w in (full() if os.environ.get("FASTGUIDE_BENCH") == "full" else quick())}


@functools.lru_cache(maxsize=1)
def inputs_of(title: str) -> Inputs:
    torch._dynamo.reset()  # or torch.compile would reach its limit of recompilations
    return Inputs(WORKLOADS[title], torch.device("cpu"))


@pytest.mark.parametrize("contender", [*CONTENDERS, *CEILINGS])
@pytest.mark.parametrize("title", WORKLOADS)
def test_step(benchmark, title, contender):
    inputs = inputs_of(title)
    benchmark.group = title
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
            error = relative_error(inputs, contender, CONTENDERS[contender](inputs)())
            assert error < tolerance(inputs, contender), f"relative error {error:.1e}"
        del result
        benchmark(call)
