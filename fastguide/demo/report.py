"""Write the demo's results: a grid of images for each method, an overview, the trade-off plot, tables, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .digits import NUM_CLASSES
from .methods import Method

_ENLARGED = 6
_OVERVIEW_SCALES = (1.0, 2.0, 4.0, 8.0)


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Arrange images of shape (n, 1, 8, 8) in rows of ``columns``, enlarged, with a line between them."""
    pixels = ((images.clamp(-1, 1) + 1) / 2).squeeze(1).numpy()
    tiles = [np.pad(np.kron(p, np.ones((_ENLARGED, _ENLARGED))), 2, constant_values=0.35) for p in pixels]
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    stacked: np.ndarray = np.vstack(rows)
    return stacked


def save_grid(method: Method, images: Tensor, per_class: int, folder: Path) -> Path:
    """Write the images of a method as a PNG with a row for each class."""
    columns = min(per_class, 12)
    shown = images.view(NUM_CLASSES, per_class, *images.shape[1:])[:, :columns].flatten(0, 1)
    figure, axes = plt.subplots(figsize=(0.42 * columns + 0.6, 4.6), layout="constrained")
    axes.imshow(mosaic(shown, columns), cmap="gray", vmin=0, vmax=1)
    tile = 8 * _ENLARGED + 4
    axes.set_yticks([tile * (c + 0.5) for c in range(NUM_CLASSES)], [str(c) for c in range(NUM_CLASSES)])
    axes.set_xticks([])
    axes.set_title(method.name, fontsize=9)
    axes.tick_params(length=0)
    file_name = "grid " + method.name.replace(", ", " ") + ".png"
    return _save(figure, folder / file_name.replace(" ", "-"))


def save_overview(samples: Mapping[Method, Tensor], per_class: int, folder: Path) -> Path:
    """Write a PNG with a panel for each solver, a row for each guidance and scale, and a column for each class."""
    shown = [m for m in samples if m.scale in (None, *_OVERVIEW_SCALES)]
    guidances = list(dict.fromkeys((m.family, m.scale) for m in shown))
    solvers = list(dict.fromkeys(m.solver for m in shown))
    tile = 8 * _ENLARGED + 4
    figure, axes = plt.subplots(1, len(solvers), figsize=(12, 0.46 * len(guidances) + 0.7), layout="constrained")
    for axis, solver in zip(axes, solvers, strict=True):
        rows = []
        for family, scale in guidances:
            images = samples.get(Method(family, scale, solver))
            rows.append(
                np.ones((tile, tile * NUM_CLASSES))  # this guidance is not used with this solver
                if images is None
                else mosaic(images[::per_class], NUM_CLASSES)
            )
        axis.imshow(np.vstack(rows), cmap="gray", vmin=0, vmax=1)
        absent = [r for r, (family, scale) in enumerate(guidances) if Method(family, scale, solver) not in samples]
        if absent:
            middle = tile * (sum(absent) / len(absent) + 0.5)
            axis.text(tile * 5, middle, "needs steps with variance", ha="center", va="center", fontsize=9)
        axis.set_title(solver.upper(), fontsize=10)
        axis.set_xticks([tile * (c + 0.5) for c in range(NUM_CLASSES)], [str(c) for c in range(NUM_CLASSES)])
        axis.xaxis.tick_top()
        names = [
            "no guidance" if family == "none" else family if scale is None else f"{family}, {scale:g}"
            for family, scale in guidances
        ]
        axis.set_yticks([tile * (r + 0.5) for r in range(len(names))], names if axis is axes[0] else [""] * len(names))
        axis.tick_params(length=0, labelsize=8)
        for side in axis.spines.values():
            side.set_visible(False)
    return _save(figure, folder / "overview.png")


def save_guidances(images: Mapping[str, Tensor], per_class: int, folder: Path) -> Path:
    """Write a PNG with a row for each kind of guidance, and a column for each class."""
    tile = 8 * _ENLARGED + 4
    figure, axis = plt.subplots(figsize=(6.6, 0.46 * len(images) + 0.7), layout="constrained")
    rows = [mosaic(of_kind[::per_class], NUM_CLASSES) for of_kind in images.values()]
    axis.imshow(np.vstack(rows), cmap="gray", vmin=0, vmax=1)
    axis.set_yticks([tile * (row + 0.5) for row in range(len(rows))], list(images))
    axis.set_xticks([tile * (c + 0.5) for c in range(NUM_CLASSES)], [str(c) for c in range(NUM_CLASSES)])
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=8)
    return _save(figure, folder / "guidances-digits.png")


def save_trade_off(rows: Iterable[Mapping[str, Any]], real: Mapping[str, float], folder: Path) -> Path:
    """Write a PNG of agreement against diversity, with a line over the scales for each kind of guidance and solver."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    families: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["family"], row["solver"]), []).append(row)
    colours = {family: f"C{i}" for i, family in enumerate(dict.fromkeys(family for family, _ in families))}
    for (family, solver), points in families.items():
        x, y = [p["diversity"] for p in points], [p["agreement"] for p in points]
        style = {"ddpm": "o-", "ddim": "s--"}[solver]
        size = 10 if len(points) == 1 else 4  # a single point shall be seen below others
        axes.plot(
            x, y, style, color=colours[family], label=f"{family} ({solver})", markersize=size, linewidth=1, alpha=0.8
        )
        for point in points:
            if point["scale"] is not None:
                axes.annotate(f"{point['scale']:g}", (point["diversity"], point["agreement"]), fontsize=6)
    axes.plot(1.0, real["agreement"], "k*", markersize=11, label="real digits, held out")
    axes.set_xlabel("diversity: coverage of real digits held out (as many real digits: 1)")
    axes.set_ylabel("agreement of an independent classifier")
    axes.set_title("Quality and diversity of the ways to sample digits (numbers: guidance scale)", fontsize=9)
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
    return _save(figure, folder / "trade-off.png")


def quality_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table with a line for each method."""
    lines = [f"{'solver':<7} {'guidance':<26} {'scale':>5} {'agreement':>10} {'diversity':>10} {'seconds':>8}"]
    for row in rows:
        scale = "-" if row["scale"] is None else f"{row['scale']:g}"
        lines.append(
            f"{row['solver']:<7} {row['family']:<26} {scale:>5} {row['agreement']:>10.1%} "
            f"{row['diversity']:>10.2f} {row['seconds']:>8.2f}"
        )
    return "\n".join(lines)


def step_table_text(errors: Mapping[str, float], speeds: Mapping[str, Mapping[str, float]]) -> str:
    """Return the error and the time of the step itself, as text."""
    lines = ["relative error of a guided DDIM loop of 50 steps, against float64:"]
    lines += [f"  {name:<34} {error:.1e}" for name, error in errors.items()]
    lines += ["", "time of one guided step on the CPU (microseconds, median):"]
    for name, times in speeds.items():
        text = "  ".join(f"{library} {t:8.1f}" for library, t in times.items())
        ratio = f"  {times['diffusers'] / times['fastguide']:6.1f}x" if "diffusers" in times else ""
        lines.append(f"  {name:<24} {text}{ratio}")
    if not any("diffusers" in times for times in speeds.values()):
        lines.append("  (to compare with diffusers: pip install diffusers)")
    return "\n".join(lines)


def save_json(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the results as JSON, and return the path."""
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
