"""The demo from beginning to end."""

from __future__ import annotations

import datetime
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._version import __version__
from ..schedules.noise_schedule import NoiseSchedule
from ..step.backends.registry import BACKENDS, default_backend
from . import checkpoints as weights
from . import checks, digits, report
from .methods import Method, all_methods, labels_to_sample, sample, step_tables
from .models import NULL_CLASS


def run(output: Path, *, quick: bool, retrain: bool, seed: int, backend: str | None) -> dict[str, Any]:
    """Train or load, sample with every method, measure, and write everything to ``output``; returns the results."""
    begin = time.perf_counter()
    chosen = backend or default_backend("cpu")
    print(f"backend: {chosen} ({BACKENDS[chosen].status})")
    if chosen != "native" and backend is None:
        print(f"         native is {BACKENDS['native'].status}")

    schedule = NoiseSchedule.linear()
    train, held_out = digits.load()
    denoiser, classifier = weights.trained(schedule, train, quick=quick, retrain=retrain)
    judge = digits.Judge(train, held_out)
    negative = digits.nearest_classes(train)
    per_class = 12 if quick else 40
    real_coverage = digits.coverage(digits.first_of_each_class(train, per_class).images, held_out)
    labels = labels_to_sample(per_class)
    tables = step_tables(schedule, quick=quick)
    samples: dict[Method, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for method in tqdm(all_methods(), desc="sampling", unit="method"):
        start = time.perf_counter()
        images = sample(method, tables[method.solver], denoiser, classifier, labels, negative, seed, backend)
        seconds = time.perf_counter() - start
        samples[method] = images
        rows.append(
            {
                "solver": method.solver,
                "family": method.family,
                "scale": method.scale,
                "agreement": judge.agreement(images, labels),
                "diversity": digits.coverage(images, held_out) / real_coverage,
                "seconds": seconds,
            }
        )
        report.save_grid(method, images, per_class, output)

    real = {"agreement": judge.accuracy, "diversity": 1.0}
    report.save_overview(samples, per_class, output)
    report.save_trade_off(rows, real, output)
    some = labels_to_sample(2)
    errors = checks.accuracy(schedule, denoiser, some, torch.full_like(some, NULL_CLASS), seed)
    speeds = checks.speed(schedule)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastguide": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "backend": chosen,
        "backend_status": BACKENDS[chosen].status,
        "quick": quick,
        "samples_per_class": per_class,
        "steps": {name: len(table) for name, table in tables.items()},
        "negative_condition_of": dict(enumerate(negative.tolist())),
        "judge_accuracy_on_held_out_digits": judge.accuracy,
        "methods": rows,
        "relative_error_of_50_ddim_steps": errors,
        "microseconds_per_guided_step": speeds,
    }
    path = report.save_json(results, output)
    print()
    print(report.quality_table(rows))
    print(
        f"(agreement: with an independent classifier, which knows {judge.accuracy:.1%} of real digits held out;\n "
        "diversity: coverage of real digits held out, relative to as many other real digits: 1 is as varied;\n "
        "a negative condition is the class whose mean image is nearest)"
    )
    print()
    print(report.step_table_text(errors, speeds))
    print()
    print(f"pictures: {output / 'overview.png'}, {output / 'trade-off.png'} and a grid per method; numbers: {path}")
    print(f"done in {time.perf_counter() - begin:.0f} s")
    return results
