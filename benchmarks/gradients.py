"""Time the backward pass of a step, and a step with its log-probability, as ratios within one run.

    python -m benchmarks.gradients [--seconds 4] [--json benchmarks/results/bench-cpu-gradients.json]

Contenders take turns in changing order. The backward pass is timed beside ``copy_`` of the bytes that it moves between
tensors that are there; beside filling as many new tensors as there are gradients, by copies of what is read; and beside
autograd through the same formula in torch, whose memory is measured too. A busy machine makes all of them slower, but
not alike: the load is noted.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguide import ClassifierFree, FlowSchedule, StepTable, ddim, ddpm, flow_match_sde, guided_step
from fastguide.step.memory import empty_like

from .measure.timing import describe, in_turns
from .report import machine
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


def backward_calls(shape: tuple[int, ...], clip: float | None) -> tuple[Calls, dict[str, Callable[[], object]]]:
    """Return the backward passes and copies, and the forward passes with them, whose memory is measured."""
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

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(forward(), inputs, came)

        return run

    read = [came] if clip is None else [came, x.detach(), uncond.detach(), cond.detach()]
    calls = {OURS: back(ours), PLAIN: back(plain), COPY: copies(read, 3), COPY_NEW: lambda: new_copies(read, 3)}
    calls[KERNEL] = kernel(table, read)
    return calls, {OURS: both(ours), PLAIN: both(plain)}


def kernel(table: StepTable, read: list[Tensor]) -> Callable[[], object]:
    """Return the operator alone, whose gradients go into tensors that are there."""
    came = read[0]
    rows = table.device_rows(None, torch.float32)
    weights = ClassifierFree(SCALE).weights(came.device, torch.float32)
    x, *predictions = read[1:] or [came] * 3  # which are not read without a clip
    places = [torch.randn_like(came) for _ in range(3)]
    step = (came, None, None, x, predictions, rows, weights, CALL, None, None, None, None)
    gradients = {"grad_out": came, "grad_sample": places[0], "grad_predictions": places[1:]}
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
            calls, whole = backward_calls(shape, clip)
            yield from _rows(what, calls, device, seconds)
            del calls
            if shape == SHAPES[-1]:
                peaks = {name: peak_bytes(call) for name, call in whole.items()}
                returned = 4 * math.prod(shape) * torch.float32.itemsize  # the output and three gradients
                for name, peak in peaks.items():
                    row = {"contender": f"{name}: memory of both passes", "status": "ok", "peak_bytes": peak}
                    row["beyond_what_is_returned"] = peak - returned
                    yield what | row | {"fastguide_s_memory_over_this": peaks[OURS] / peak}


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


def peak_bytes(call: Callable[[], object]) -> int:
    """Return by how much a call raises the process' memory at most, on Linux."""
    call()
    status = Path("/proc/self/status")

    def read(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is there
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each workload")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to save the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, begin, rows = torch.device("cpu"), time.perf_counter(), []
    about = machine.machine(device) | {"load before": f"{os.getloadavg()[0]:.1f}"}
    for part in (backward, log_probability):
        for row in part(device, options.seconds):
            rows.append(row)
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, (int, float)))
            print(f"{row['workload']}: {row['contender']}: {numbers or row.get('reason')}", flush=True)
    if options.json is not None:
        results = {"machine": about, "seconds": time.perf_counter() - begin, "interrupted": False, "rows": rows}
        save(results, options.json)


if __name__ == "__main__":
    main()
