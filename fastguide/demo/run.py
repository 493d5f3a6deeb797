"""Run the demo: train, sample with every kind of guidance, measure, and write the results."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._version import __version__
from ..schedules import NoiseSchedule
from ..step.backends.registry import BACKENDS, default_backend
from . import checkpoints, checks, convergence, digits, figures, guidances, paths, ranks, report
from .methods import Method, all_methods, labels_to_sample, sample, step_tables
from .models import NULL_CLASS, Denoiser, NoiseAwareClassifier

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def closed_form(output: Path) -> dict[str, Any]:
    """Write the figures of problems whose model is known in closed form, in seconds and without training.

    Returns:
        The errors of each solver against its model calls, and the orders that were fitted to them.
    """
    begin = time.perf_counter()
    lines = convergence.lines()
    written = [
        figures.save_convergence(lines, output),
        figures.save_paths({scale: paths.paths(scale) for scale in paths.SCALES}, output),
        figures.save_guidances(guidances.on_mixture(), output),
    ]
    print(f"{', '.join(map(str, written))}: {time.perf_counter() - begin:.0f} s")
    return {line.name: {"order": line.slope, "errors": dict(line.points)} for line in lines}


def run(
    output: Path, *, quick: bool, retrain: bool, seed: int, backend: str | None, mesh: DeviceMesh | None = None
) -> dict[str, Any]:
    """Run the whole demo, write its files to ``output``, and return the results.

    Args:
        output: an existing folder.
        quick: train for less time, and sample less.
        retrain: train even if trained models are in the cache.
        seed: of the sampling noise.
        backend: of the steps; ``None``: the fastest on this CPU.
        mesh: processes that share the sampling; all but the first do nothing else, and return nothing.
    """
    begin = time.perf_counter()
    chosen = backend or default_backend("cpu")
    schedule = NoiseSchedule.linear()
    solvers = _begin(chosen, backend, output, mesh) if ranks.is_first(mesh) else {}
    train, held_out = digits.load()
    train_both = partial(checkpoints.trained, schedule, train, quick=quick, retrain=retrain)
    denoiser, classifier = ranks.of_the_first(mesh, train_both, Denoiser, NoiseAwareClassifier)
    negative = digits.nearest_classes(train)
    per_class = 12 if quick else 40
    labels = labels_to_sample(per_class)
    tables = step_tables(schedule, quick=quick)

    def of_method(method: Method) -> Tensor:
        table = tables[method.solver]
        return sample(method, table, denoiser, classifier, labels, negative, seed, backend, mesh)

    def of_kind(name: str) -> Tensor:
        return guidances.images_of(name, tables["ddim"], denoiser, labels, seed, backend, mesh)

    if not ranks.is_first(mesh):
        for method in all_methods():
            of_method(method)
        for name in guidances.KINDS:
            of_kind(name)
        return {}

    numbers, compared = _compare_all(of_method, of_kind, labels, train, held_out, output)
    some = labels_to_sample(2)
    results = {
        **_environment(chosen),
        "quick": quick,
        "processes": 1 if mesh is None else mesh.size(),
        "samples_per_class": per_class,
        "steps": {name: len(table) for name, table in tables.items()},
        "negative_condition_of": dict(enumerate(negative.tolist())),
        **numbers,
        "error_of_solvers_by_model_calls": solvers,
        "relative_error_of_50_ddim_steps": checks.accuracy(
            schedule, denoiser, some, torch.full_like(some, NULL_CLASS), seed
        ),
        "microseconds_per_guided_step": checks.speed(schedule),
    }
    _show(results, guidances.table_of(compared), output, report.save_json(results, output))
    print(f"done in {time.perf_counter() - begin:.0f} s")
    return results


def _begin(chosen: str, asked: str | None, output: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Tell what runs, and write the figures that need no training."""
    print(f"backend: {chosen} ({BACKENDS[chosen].status})")
    if chosen != "native" and asked is None:
        print(f"         native is {BACKENDS['native'].status}")
    if mesh is not None:
        print(f"sampling: shared by {mesh.size()} process(es)")
    return closed_form(output)


def _compare_all(
    of_method: Callable[[Method], Tensor],
    of_kind: Callable[[str], Tensor],
    labels: Tensor,
    train: digits.Digits,
    held_out: digits.Digits,
    output: Path,
) -> tuple[dict[str, Any], list[guidances.OnDigits]]:
    """Sample with every method and kind of guidance, and write the pictures; return the numbers, and the kinds."""
    judge = digits.Judge(train, held_out)
    per_class = len(labels) // digits.NUM_CLASSES
    real_coverage = digits.coverage(digits.first_of_each_class(train, per_class).images, held_out)
    rows = _compare_methods(of_method, labels, judge, held_out, real_coverage, output)
    compared = guidances.on_digits(of_kind, judge, held_out, labels, real_coverage)
    report.save_guidances({each.name: each.images for each in compared}, per_class, output)
    numbers = {
        "judge_accuracy_on_held_out_digits": judge.accuracy,
        "methods": rows,
        "kinds_of_classifier_free_guidance": [each.numbers() for each in compared],
    }
    return numbers, compared


def _compare_methods(
    sampled: Callable[[Method], Tensor],
    labels: Tensor,
    judge: digits.Judge,
    held_out: digits.Digits,
    real_coverage: float,
    output: Path,
) -> list[dict[str, Any]]:
    """Sample with each method, measure its images, and write the pictures; return a row for each."""
    samples: dict[Method, Tensor] = {}
    rows: list[dict[str, Any]] = []
    per_class = len(labels) // digits.NUM_CLASSES
    for method in tqdm(all_methods(), desc="sampling", unit="method"):
        start = time.perf_counter()
        images = samples[method] = sampled(method)
        seconds = time.perf_counter() - start
        quality = {
            "agreement": judge.agreement(images, labels),
            "diversity": digits.coverage(images, held_out) / real_coverage,
        }
        about = {"solver": method.solver, "family": method.family, "scale": method.scale}
        rows.append({**about, **quality, "seconds": seconds})
        report.save_grid(method, images, per_class, output)
    report.save_overview(samples, per_class, output)
    report.save_trade_off(rows, {"agreement": judge.accuracy, "diversity": 1.0}, output)
    return rows


def _environment(backend: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastguide": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "backend": backend,
        "backend_status": BACKENDS[backend].status,
    }


def _show(results: Mapping[str, Any], kinds: str, output: Path, numbers: Path) -> None:
    print()
    print(report.quality_table(results["methods"]))
    accuracy = results["judge_accuracy_on_held_out_digits"]
    print(
        f"(agreement: with an independent classifier, which is right for {accuracy:.1%} of the real digits held out;\n"
        " diversity: coverage of the real digits held out, over that of as many other real digits;\n"
        " negative condition: the class with the nearest mean image)"
    )
    print()
    print(kinds)
    print("(of DDIM; saturation: black and white pixels, over those of real digits)")
    print()
    print(report.step_table_text(results["relative_error_of_50_ddim_steps"], results["microseconds_per_guided_step"]))
    print()
    pictures = f"{output / 'overview.png'}, {output / 'trade-off.png'}, {output / 'guidances-digits.png'} and more"
    print(f"pictures: {pictures}; numbers: {numbers}")
