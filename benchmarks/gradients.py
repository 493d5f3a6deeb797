"""Time the backward pass of a step, and a step with its log-probability, as ratios within one run.

    python -m benchmarks.gradients [--seconds 4] [--only memory] [--json benchmarks/results/bench-cpu-gradients.json]

Contenders take turns in changing order. The backward pass is timed beside ``copy_`` of the bytes that it moves between
tensors that are there; beside filling as many new tensors as there are gradients, by copies of what is read; and beside
autograd through the same formula in torch. A busy machine makes all of them slower, but not alike: the load is noted.
Memory is counted, allocation by allocation, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguide import ClassifierFree, FlowSchedule, StepTable, ddim, ddpm, flow_match_sde, guided_step
from fastguide.step.backward import empty_clipped
from fastguide.step.memory import empty_like

from .measure import gradient_memory
from .measure.allocations import Memory
from .measure.timing import describe, in_turns
from .report import machine, pages, targets
from .report.memory_targets import memory_targets
from .report.results import save
from .workloads import SCHEDULE

CALL, SCALE = 10, 7.5
SHAPES = ((1, 4, 64, 64), (64, 3, 256, 256))
OURS, PLAIN = "fastguide", "autograd of the formula in torch"
COPY, COPY_NEW = "copy_ of the same bytes", "copy_ of what is read, into as many new tensors"
KERNEL = "fastguide's kernel, into tensors that are there"
STEP = "the step alone"

Row = dict[str, Any]
Calls = dict[str, Callable[[], object]]


def backward_calls(shape: tuple[int, ...], clip: float | None) -> Calls:
    """Return the backward passes and copies."""
    table = ddim(SCHEDULE, 50, clip_sample_range=clip)
    x, uncond, cond = (torch.randn(shape).requires_grad_() for _ in range(3))
    came, inputs = torch.randn(shape), [x, uncond, cond]
    row = {name: float(values[CALL]) for name, values in table.coefficients().items()}

    def ours() -> Tensor:
        return guided_step(table, CALL, x, [uncond, cond], ClassifierFree(SCALE))

    def plain() -> Tensor:
        m = uncond + SCALE * (cond - uncond)
        x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        return row["out_x0"] * x0 + row["out_sample"] * x + row["out_pred"] * m

    def back(forward: Callable[[], Tensor]) -> Callable[[], object]:
        with torch.enable_grad():
            y = forward()
        return lambda: torch.autograd.grad(y, inputs, came, retain_graph=True)

    calls = {OURS: back(ours), PLAIN: back(plain), COPY: copies([came], 3), COPY_NEW: lambda: new_copies([came], 3)}
    calls[KERNEL] = kernel(table, came)
    return calls


def kernel(table: StepTable, came: Tensor) -> Callable[[], object]:
    """Return the operator alone, whose gradients go into tensors that are there; half the elements are clipped.

    Bits of a clip, a thirty-second of a tensor, are not counted among the bytes that it moves.
    """
    rows = table.device_rows(None, torch.float32)
    weights = ClassifierFree(SCALE).weights(came.device, torch.float32)
    places = [torch.randn_like(came) for _ in range(3)]
    not_read = came, [came] * 2
    step = (came, None, None, *not_read, rows, weights, CALL, None, None, None, None)
    clipped = empty_clipped(came).random_(256) if table.clips else None
    gradients = {"grad_out": came, "grad_sample": places[0], "grad_predictions": places[1:], "clipped": clipped}
    return lambda: torch.ops.fastguide.guided_step_backward(*step, **gradients)


def copies(read: list[Tensor], written: int) -> Callable[[], object]:
    """Return copies between tensors that are there, of as many bytes as are read and written."""
    total = len(read) + written
    pairs = [(torch.randn_like(source), source) for source in (read * 2)[: total // 2]]
    if total % 2:  # half a tensor is read, and half a tensor written
        half = read[0].flatten()[: read[0].numel() // 2]
        pairs.append((torch.randn_like(half), half))
    return lambda: [place.copy_(source) for place, source in pairs]


def new_copies(read: list[Tensor], written: int) -> list[Tensor]:
    """Fill new tensors with what is read, or with zeros where less is read than written."""
    new = [empty_like(read[0]) for _ in range(written)]
    for place, source in zip(new, read, strict=False):
        place.copy_(source)
    for place in new[len(read) :]:
        place.zero_()
    return new


def backward(device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield the rows of backward passes."""
    for shape in SHAPES:
        for clip in (None, 1.0):
            title = f"backward of ddim, {'clipped, ' if clip else ''}{shape}, float32"
            what = {"suite": "gradients", "workload": title}
            yield from _rows(what, backward_calls(shape, clip), device, seconds)


def memory(device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield the rows of both passes' memory; it is counted, and takes the seconds that it takes."""
    for name, step in gradient_memory.steps().items():
        title = gradient_memory.step_title(name)
        yield from _memory_rows({"suite": "gradients", "workload": title}, gradient_memory.recorded_step(step).memory())
    for name, run in gradient_memory.runs().items():
        title = gradient_memory.run_title(name)
        yield from _memory_rows({"suite": "gradients", "workload": title}, gradient_memory.recorded_run(run).memory())


def _memory_rows(what: Row, found: dict[str, Memory]) -> Iterator[Row]:
    ours = next(iter(found.values()))._asdict()
    for name, used in found.items():
        row: Row = {"contender": name, "status": "ok"}
        for part, size in used._asdict().items():
            row |= {f"{part}_bytes": size}
            row |= {f"{part}_of_fastguide_over_this": ours[part] / size} if size else {}
        yield what | row


def log_probability(device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield the rows of steps with a log-probability."""
    tables = {"ddpm": ddpm(SCHEDULE, 50), "flow sde": flow_match_sde(FlowSchedule(), 50)}
    for shape in SHAPES:
        for name, table in tables.items():
            what = {"suite": "gradients", "workload": f"log-probability of {name}, {shape}, float32"}
            yield from _rows(what, log_probability_calls(table, shape), device, seconds)


def log_probability_calls(table: StepTable, shape: tuple[int, ...]) -> Calls:
    """Return a step with its log-probability, and without."""
    x, uncond, cond, noise, out = (torch.randn(shape) for _ in range(5))
    guidance = ClassifierFree(SCALE)

    def with_log_prob() -> object:
        return guided_step(table, CALL, x, [uncond, cond], guidance, noise=noise, out=out, return_log_prob="mean")

    return {
        OURS: with_log_prob,
        STEP: lambda: guided_step(table, CALL, x, [uncond, cond], guidance, noise=noise, out=out),
    }


def _rows(what: Row, calls: Calls, device: torch.device, seconds: float) -> Iterator[Row]:
    times, failures = in_turns(calls, seconds, device)
    for name, error in failures.items():
        yield what | {"contender": name, "status": "failed", "reason": describe(error)}
    for name, found in times.items():
        ratio, fastest = times[OURS].median / found.median, times[OURS].low / found.low
        row = what | {"contender": name, "status": "ok", **found.fields}
        if COPY in times:
            row["this_over_copy"] = found.median / times[COPY].median
        yield row | {"fastguide_s_time_over_this": ratio, "the_same_of_the_fastest_tenths": fastest}


PARTS = {"backward": backward, "memory": memory, "log_probability": log_probability}


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each workload")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts alone")
    parser.add_argument("--json", type=Path, help="where to save the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, begin, rows = torch.device("cpu"), time.perf_counter(), []
    about = machine.machine(device) | {"load before": f"{os.getloadavg()[0]:.1f}"}
    for part in options.only:
        for row in PARTS[part](device, options.seconds):
            rows.append(row)
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, (int, float)))
            print(f"{row['workload']}: {row['contender']}: {numbers or row.get('reason')}", flush=True)
    if "memory" in options.only:
        rows += targets.judged(rows, device.type, memory_targets())
        print(pages.terminal([row for row in rows if row["suite"] == "targets"], sys.stdout.isatty()))
    if options.json is not None:
        results = {"machine": about, "seconds": time.perf_counter() - begin, "interrupted": False, "rows": rows}
        save(results, options.json)


if __name__ == "__main__":
    main()
