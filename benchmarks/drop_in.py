"""The drop-in for diffusers beside diffusers: guidance and ``scheduler.step``, on the CPU, in turns in one run.

python -m benchmarks.drop_in --output benchmarks/results/drop-in-cpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

import fastguide
import fastguide.diffusers

from .compare import processor

SHAPES = [(1, 4, 64, 64), (64, 3, 256, 256)]
SCALE, STEPS, STEP = 7.5, 50, 20


def contenders(kind: str, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """One guided step each; with the ceilings: what the noise takes, and a copy of the bytes that must move."""
    generator = torch.Generator().manual_seed(0)
    sample, output = torch.randn(shape, generator=generator), torch.randn(2 * shape[0], *shape[1:], generator=generator)
    ours, theirs = (getattr(library, kind)(clip_sample=False) for library in (fastguide.diffusers, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
    timestep = ours.timesteps[STEP]

    def by_diffusers() -> Any:
        uncond, cond = output.chunk(2)
        guided = uncond + SCALE * (cond - uncond)
        return theirs.step(guided, timestep, sample, generator=generator).prev_sample

    def by_fastguide() -> Any:
        return ours.step(output, timestep, sample, generator=generator, guidance_scale=SCALE).prev_sample

    states = generator.get_state()
    first = by_fastguide()
    generator.set_state(states)
    second = by_diffusers()
    if not (first - second).norm() < 1e-5 * second.norm():
        raise AssertionError(f"{kind} {shape}: the two disagree by {(first - second).norm() / second.norm():.1e}")

    noise, source = torch.empty(shape), torch.ones(2 * sample.nbytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    calls = {
        "fastguide": by_fastguide,
        "diffusers": by_diffusers,
        "copy_ of the same bytes": lambda: target.copy_(source),
    }
    return calls | (
        {"torch's noise alone": lambda: noise.normal_(generator=generator)} if kind.startswith("DDPM") else {}
    )


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median microseconds; in turns, so that a busy neighbour slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    """Measure and print; write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the results here, as JSON")
    parser.add_argument("--seconds", type=float, default=10.0, help="per shape and scheduler (default: %(default)s)")
    options = parser.parse_args()
    results = {}
    with torch.no_grad():
        for shape in SHAPES:
            for kind in ("DDIMScheduler", "DDPMScheduler"):
                medians = results[f"{kind} {shape}"] = measure(contenders(kind, shape), options.seconds)
                print(f"\n{kind} {shape}")
                for name, microseconds in medians.items():
                    print(
                        f"  {name:<24} {microseconds:10.1f} us  {microseconds / medians['fastguide']:6.2f} x fastguide"
                    )
    if options.output is not None:
        machine = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "fastguide": fastguide.__version__,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"machine": machine, "median_microseconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
