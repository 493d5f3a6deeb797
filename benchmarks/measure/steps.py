"""Time guided steps, each contender checked against float64 first, and how the time of a step grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fastguide import ClassifierFree, Composed, Guidance, Sampler, ddim, guided_step

from ..contenders.correctness import relative_error, tolerance
from ..contenders.registry import CEILINGS, CONTENDERS, is_ours
from ..workloads import SCHEDULE, STEP, Inputs, NotRunError, Workload
from .caches import cold_caches
from .timing import describe, host_seconds, in_a_graph, in_turns

Row = dict[str, Any]

_GRAPHED = ("fastguide out=", "fastguide out=, seeds=", "torch.compile out=", "copy_ of the same bytes")
_SMALL_BYTES = 2**22  # a smaller step is also timed in a graph: most of its time are launches


def measure(workload: Workload, device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield a row for each contender: its times, or why there are none. A wrong result is not timed."""
    torch._dynamo.reset()  # otherwise torch.compile would reach its limit of recompilations
    inputs = Inputs(workload, device)
    calls, errors = {}, {}
    for name, make in (CONTENDERS | CEILINGS).items():
        row: Row = {"suite": "steps", "workload": workload.title, "contender": name}
        try:
            call = make(inputs)
            if name not in CEILINGS:
                with torch.no_grad():
                    errors[name] = relative_error(inputs, name, call())
                if not errors[name] < tolerance(inputs, name):
                    yield row | {"status": "wrong", "reason": f"relative error {errors[name]:.1e}"}
                    continue
        except NotRunError as reason:
            yield row | {"status": "not run", "reason": str(reason)}
            continue
        except Exception as error:  # reported in its row; the others are still timed
            yield row | failed(name, error)
            continue
        calls[name] = call
    before = cold_caches(inputs.bytes, inputs.sample.nbytes)
    times, failures = in_turns(calls, seconds, device, before=before)
    for name, failure in failures.items():
        row = {"suite": "steps", "workload": workload.title, "contender": name}
        yield row | failed(name, failure)
    copy = times.get("copy_ of the same bytes")
    if device.type == "cuda" and inputs.bytes < _SMALL_BYTES:
        yield from _graphed(inputs, {name: calls[name] for name in _GRAPHED if name in calls})
    for name, found in times.items():
        ahead = {"host_seconds": host_seconds(calls[name], device)} if device.type == "cuda" else {}
        yield ahead | {
            "suite": "steps",
            "workload": workload.title,
            "contender": name,
            "status": "ok",
            **found.fields,
            "bytes": inputs.bytes,
            "adds_noise": inputs.noisy,
            "bytes_per_second": inputs.bytes / found.median,
            **({} if copy is None else {"share_of_copy": copy.median / found.median}),
            "error": errors.get(name),
        }


def failed(contender: str, error: Exception) -> Row:
    """Return a row's part for an exception: failed if the contender is ours, not run and raised if a rival."""
    return {"status": "failed" if is_ours(contender) else "not run", "reason": describe(error), "raised": True}


def _graphed(inputs: Inputs, calls: dict[str, Callable[[], Any]]) -> Iterator[Row]:
    """Time calls again in a CUDA graph, without those whose noise torch's generator makes outside of the kernel."""
    for name, call in calls.items():
        if inputs.noisy and not name.endswith("seeds=") and name != "copy_ of the same bytes":
            continue
        contender = f"{name}, in a graph"
        row: Row = {"suite": "steps", "workload": inputs.workload.title, "contender": contender}
        try:
            seconds = in_a_graph(call, 50)
        except Exception as error:
            yield row | failed(contender, error)
            continue
        yield row | {"status": "ok", "seconds": seconds, "bytes": inputs.bytes, "adds_noise": inputs.noisy}


def growth(device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield how time grows with the number of elements, batch, conditions and steps, and the line fitted to it."""

    def step(shape: tuple[int, ...], guidance: Guidance) -> Callable[[], object]:
        table = ddim(SCHEDULE, 50).to(device)
        sample = torch.randn(shape, device=device)
        predictions = [torch.randn(shape, device=device) for _ in range(guidance.num_predictions)]
        out = torch.empty_like(sample)
        return lambda: guided_step(table, STEP, sample, predictions, guidance, out=out)

    def loop(steps: int) -> Callable[[], object]:
        sampler = Sampler(lambda x, t: 0.1 * x, ddim(SCHEDULE, steps).to(device))
        x = torch.randn(1, 4, 64, 64, device=device)
        return lambda: sampler(x)

    free = ClassifierFree(7.5)
    grown: dict[str, dict[int, Callable[[], object]]] = {
        "elements": {n: step((1, n), free) for n in (2**18, 2**19, 2**20, 2**21, 2**22)},
        "batch": {b: step((b, 4, 64, 64), free) for b in (16, 32, 64, 128, 256)},
        "conditions": {k: step((16, 4, 64, 64), Composed([1.0] * k)) for k in (1, 2, 4, 8, 16)},
        "steps": {n: loop(n) for n in (10, 20, 40, 80, 160)},
    }
    for what, calls in grown.items():
        before = None if what == "steps" else cold_caches(2**26, 2**24)  # bytes of the largest of these steps
        times, failures = in_turns({str(x): call for x, call in calls.items()}, seconds, device, before=before)
        if failures:
            yield {
                "suite": "growth",
                "against": what,
                "status": "failed",
                "reason": describe(next(iter(failures.values()))),
            }
            continue
        points = [(x, times[str(x)].median) for x in calls]
        slope, intercept, determination = line(points)
        bend = steeper(points)
        yield {
            "suite": "growth",
            "against": what,
            "points": points,
            "seconds_each": slope,
            "seconds_fixed": intercept,
            "r_squared": determination,
            "bend": bend,
            "linear": determination > 0.99 and 1 / _STRAIGHT < bend < _STRAIGHT,
            "status": "ok",
        }


_STRAIGHT = 1.25  # quadratic growth bends by 4; leaving a cache bends by a tenth


def steeper(points: Sequence[tuple[float, float]]) -> float:
    """Return how much steeper the upper half of the points is: 1 for a line, 4 for a square if x doubles each time."""
    (a, low), (b, middle), (c, high) = points[0], points[len(points) // 2], points[-1]
    return (high - middle) / (c - b) / ((middle - low) / (b - a))


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least squares; each point is weighted by 1 over its value."""
    pairs = torch.tensor(list(points), dtype=torch.float64)
    x, y = pairs.unbind(1)
    weight = 1 / y
    design = torch.stack([x, torch.ones_like(x)], 1)
    slope, intercept = torch.linalg.lstsq(design * weight[:, None], (y * weight)[:, None]).solution[:, 0].tolist()
    residual = (y - slope * x - intercept).square().sum()
    total = (y - y.mean()).square().sum()
    return slope, intercept, float(1 - residual / total)
