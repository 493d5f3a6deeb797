"""Time the backward pass of a step, and a step with its log-probability, as ratios within one run.

    python -m benchmarks.gradients [--seconds 4] [--json benchmarks/results/bench-cpu-gradients.json]

Contenders take turns in changing order. The backward pass is timed beside ``copy_`` of the bytes that it moves, into
memory that is there and into new tensors, as gradients are; and beside autograd through the same formula in torch, whose
memory is measured too. A busy machine makes all of them slower, but not alike: the load is noted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguide import ClassifierFree, FlowSchedule, ddim, ddpm, flow_match_sde, guided_step
from fastguide.step.memory import empty_like

from .measure.timing import describe, in_turns
from .report import machine
from .report.results import save
from .workloads import SCHEDULE

CALL, SCALE = 10, 7.5
SHAPES = ((1, 4, 64, 64), (64, 3, 256, 256))
OURS, PLAIN = "fastguide", "autograd of the formula in torch"
COPY, COPY_NEW = "copy_ of the same bytes", "copy_ of the same bytes, into new tensors"
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
    moved = copies(read, 3)
    calls = {OURS: back(ours), PLAIN: back(plain), COPY: moved(False), COPY_NEW: moved(True)}
    return calls, {OURS: both(ours), PLAIN: both(plain)}


def copies(read: list[Tensor], written: int) -> Callable[[bool], Callable[[], object]]:
    """Return copies of as many bytes as are read and written; an odd tensor is half a copy."""
    total = len(read) + written
    sources = [read[k % len(read)] for k in range(total // 2)]
    places = [torch.randn_like(source) for source in sources]
    half = read[0][: max(len(read[0]) // 2, 1)] if total % 2 else None
    half_place = None if half is None else torch.randn_like(half)

    def make(new: bool) -> Callable[[], object]:
        def run() -> object:
            kept = [(empty_like(p) if new else p).copy_(s) for p, s in zip(places, sources, strict=True)]
            if half is not None and half_place is not None:
                kept.append((empty_like(half_place) if new else half_place).copy_(half))
            return kept

        return run

    return make


def backward(device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield the rows of backward passes."""
    for shape in SHAPES:
        for clip in (None, 1.0):
            what = {
                "suite": "gradients",
                "workload": f"backward of ddim, {'clipped, ' if clip else ''}{shape}, float32",
            }
            calls, whole = backward_calls(shape, clip)
            yield from _rows(what, calls, device, seconds, OURS)
            del calls
            if shape == SHAPES[-1]:
                peaks = {name: peak_bytes(call) for name, call in whole.items()}
                for name, peak in peaks.items():
                    yield what | {"contender": f"{name}: memory of both passes", "status": "ok", "peak_bytes": peak}
                yield what | {"contender": "memory", "status": "ok", "of_torch_s": peaks[OURS] / peaks[PLAIN]}


def log_probability(device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield the rows of steps with a log-probability."""
    tables = {"ddpm": ddpm(SCHEDULE, 50), "flow sde": flow_match_sde(FlowSchedule(), 50)}
    for shape in SHAPES:
        for name, table in tables.items():
            x, uncond, cond, noise, out = (torch.randn(shape) for _ in range(5))
            guidance = ClassifierFree(SCALE)
            options = {"noise": noise, "out": out}

            def step(return_log_prob: Any, options: dict[str, Any] = options, table: Any = table) -> object:
                both = [uncond, cond]
                return guided_step(table, CALL, x, both, guidance, return_log_prob=return_log_prob, **options)

            calls: Calls = {OURS: lambda step=step: step("mean"), STEP: lambda step=step: step(False)}  # type: ignore[misc]
            what = {"suite": "gradients", "workload": f"log-probability of {name}, {shape}, float32"}
            yield from _rows(what, calls, device, seconds, OURS)


def _rows(what: Row, calls: Calls, device: torch.device, seconds: float, ours: str) -> Iterator[Row]:
    times, failures = in_turns(calls, seconds, device)
    for name, error in failures.items():
        yield what | {"contender": name, "status": "failed", "reason": describe(error)}
    for name, found in times.items():
        ratio = times[ours].median / found.median
        fastest = times[ours].low / found.low
        row = what | {"contender": name, "status": "ok", **found.fields}
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
            times = {
                key: value for key, value in row.items() if key not in ("suite", "workload", "contender", "status")
            }
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in times.items() if isinstance(value, (int, float)))
            print(f"{row['workload']}: {row['contender']}: {numbers or row.get('reason')}", flush=True)
    if options.json is not None:
        results = {"machine": about, "seconds": time.perf_counter() - begin, "interrupted": False, "rows": rows}
        save(results, options.json)


if __name__ == "__main__":
    main()
