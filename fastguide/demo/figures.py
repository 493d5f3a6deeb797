"""Draw the figures of the problems in closed form: error against model calls, sampling paths, kinds of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .convergence import GUIDANCE_SCALE, Line
from .guidances import SCALE, OnMixture
from .mixture import log_density

_SHOWN = 40  # paths
_EXTENT = 2.6


def save_convergence(lines: Sequence[Line], folder: Path) -> Path:
    """Write ``solvers.png``: the error of each solver against its model calls, both as logarithms."""
    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    styles = ["-", "--", ":"]
    for number, line in enumerate(sorted(lines, key=lambda line: line.points[-1][1], reverse=True)):
        calls, errors = zip(*line.points, strict=True)
        style = f"C{number % 10}{styles[number // 10]}"
        width = 3.6 if line.name == "Euler, flow" else 1.2  # the same steps as Euler's, which is drawn over it
        label = f"{line.name} ({line.slope:.1f})"
        axes.loglog(calls, errors, style, marker="o", markersize=2.5, linewidth=width, label=label)
    reach = lines[0].points[0][0], lines[0].points[-1][0]
    for order in (1, 2, 3, 4):
        axes.loglog(reach, [0.5, 0.5 * (reach[0] / reach[1]) ** order], color="0.8", linewidth=0.8, zorder=0)
        end = (0.97 * reach[1], 0.5 * (reach[0] / reach[1]) ** order)
        axes.annotate(f"order {order}", end, ha="right", va="bottom", fontsize=7, color="0.5")
    axes.set_xlabel("model calls, each with and without the condition")
    axes.set_ylabel("relative error of the sample")
    axes.set_title(
        f"Classifier-free guidance of scale {GUIDANCE_SCALE:g} on a mixture of Gaussians (numbers: fitted orders)",
        fontsize=9,
    )
    axes.set_xticks([6, 10, 20, 40, 60, 90, 130], ["6", "10", "20", "40", "60", "90", "130"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower left", ncols=2)
    return _save(figure, folder / "solvers.png")


def save_paths(found: Mapping[float, Tensor], folder: Path) -> Path:
    """Write ``paths.png``: a panel for each guidance scale, with the data's density, some paths, and where all end."""
    figure, panels = plt.subplots(1, len(found), figsize=(3.3 * len(found), 3.7), layout="constrained")
    figure.suptitle("From noise (blue) to samples (red), guided to the class on the left", fontsize=9)
    for axes, (scale, samples) in zip(panels, found.items(), strict=True):
        _draw_density(axes)
        for path in samples[:, :_SHOWN].unbind(1):
            axes.plot(path[:, 0], path[:, 1], color="C0", linewidth=0.5, alpha=0.5)
        axes.plot(samples[0, :_SHOWN, 0], samples[0, :_SHOWN, 1], ".", color="C0", markersize=2)
        axes.plot(samples[-1, :, 0], samples[-1, :, 1], ".", color="C3", markersize=2)
        axes.set_title(f"guidance scale {scale:g}", fontsize=9)
    return _save(figure, folder / "paths.png")


def save_guidances(found: Sequence[OnMixture], folder: Path) -> Path:
    """Write ``guidances.png``: where samples of the mixture end with each kind of guidance, at one large scale."""
    columns = 4
    rows = -(-len(found) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(2.9 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(f"Guidance of scale {SCALE:g} to the class on the left; its own samples have distance 0, spread 1")
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, each in zip(panels.flat, found, strict=False):
        axes.set_axis_on()
        _draw_density(axes)
        axes.plot(each.samples[:, 0], each.samples[:, 1], ".", color="C3", markersize=2)
        axes.set_title(f"{each.name}\ndistance {each.distance:.1f}, spread {each.spread:.2f}", fontsize=9)
    return _save(figure, folder / "guidances.png")


def _draw_density(axes: Any) -> None:
    """Draw the density of the mixture, and nothing around it."""
    ticks = torch.linspace(-_EXTENT, _EXTENT, 120, dtype=torch.float64)
    density = log_density(torch.cartesian_prod(ticks, ticks)).exp().view(120, 120).T
    axes.contourf(ticks, ticks, density, levels=12, cmap="Greys", alpha=0.6)
    axes.set_xlim(-_EXTENT, _EXTENT)
    axes.set_ylim(-_EXTENT, _EXTENT)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
