"""Draw the report's plots; a plot whose rows were not measured is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..contenders.registry import COMPILED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def plots(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Yield each plot with its name: speed-up, roofline, error against speed, loops, growth, guidance.

    Raises:
        ImportError: matplotlib is not installed.
    """
    measured = [r for r in rows if r["status"] == "ok"]
    steps = [r for r in measured if r["suite"] == "steps"]
    errors = [r for r in measured if r["suite"] == "accuracy" and r["solver"] == "ddim"]
    loops = [r for r in measured if r["suite"] == "loops" and " steps" in r["workload"]]
    growth = [r for r in measured if r["suite"] == "growth"]
    guidance = [r for r in measured if r["suite"] == "guidance"]
    if steps:
        yield "speed-up", _speed_up(steps)
        yield "roofline", _roofline(steps)
    if errors:
        yield "error-against-speed", _error_against_speed(errors)
    if loops:
        yield "loops", _loops(loops)
    if growth:
        yield "growth", _growth(growth)
    if guidance:
        yield "guidance", _guidance(guidance)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _speed_up(rows: Sequence[Row]) -> Figure:
    by_workload: dict[str, dict[str, float]] = {}
    for r in rows:
        by_workload.setdefault(r["workload"], {})[r["contender"]] = r["seconds"]
    figure = _figure(9, 0.9 + 0.55 * len(by_workload))
    axes = figure.subplots()
    rivals: dict[str, tuple[str, ...]] = {name: (name,) for name in ("diffusers", "guided-diffusion", "torch eager")}
    rivals["torch.compile, its fastest mode"] = COMPILED
    rivals["torch.compile out=, its fastest mode, beside fastguide out="] = tuple(f"{mode} out=" for mode in COMPILED)
    for n, (label, names) in enumerate(rivals.items()):
        ours = "fastguide out=" if names[0].endswith("out=") else "fastguide"
        places, values = [], []
        for w, seconds in enumerate(by_workload.values()):
            measured = [seconds[name] for name in names if name in seconds]
            if measured and ours in seconds:
                places.append(w + 0.17 * (n - 2))
                values.append(min(measured) / seconds[ours])
        axes.barh(places, [value - 1 for value in values], left=1, height=0.15, label=label)
    for w, seconds in enumerate(by_workload.values()):
        if not {"fastguide", "fastguide out="} <= seconds.keys():
            axes.annotate("fastguide was not timed", (1, w), color="red", fontsize=7, va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(by_workload)), list(by_workload), fontsize=7)
    axes.set_ylim(len(by_workload) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("times slower than fastguide")
    figure.legend(loc="outside upper right", ncols=2, fontsize=7)
    return figure


def _roofline(rows: Sequence[Row]) -> Figure:
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    marks: dict[str, tuple[str, tuple[str, ...]]] = {
        "fastguide out=": ("o", ("fastguide out=",)),
        "torch.compile out=, its fastest mode": ("s", tuple(f"{mode} out=" for mode in COMPILED)),
        "diffusers": ("x", ("diffusers",)),
        "copy_ of the same bytes": ("_", ("copy_ of the same bytes",)),
    }
    for label, (mark, names) in marks.items():
        best: dict[tuple[int, str], float] = {}
        for r in rows:
            if r["contender"] in names and not r["adds_noise"]:
                key = (r["bytes"], r["workload"])
                best[key] = max(best.get(key, 0.0), r["bytes_per_second"] / 1e9)
        points = sorted((size, rate) for (size, _), rate in best.items())
        if points:
            axes.plot(*zip(*points, strict=True), marker=mark, linestyle=":", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes of a step without noise")
    axes.set_ylabel("GB/s")
    axes.legend(fontsize=7)
    return figure


def _error_against_speed(rows: Sequence[Row]) -> Figure:
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for contender in dict.fromkeys(r["contender"] for r in rows):
        own = [r for r in rows if r["contender"] == contender]
        points = [(1e6 * r["seconds"], r["error"]) for r in own]
        axes.scatter(*zip(*points, strict=True), label=contender)
        for r, point in zip(own, points, strict=True):
            axes.annotate(r["dtype"], point, fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlim(0, 1.2 * max(1e6 * r["seconds"] for r in rows))
    axes.set_xlabel("time of a DDIM step of (1, 4, 64, 64), us")
    axes.set_ylabel("relative error of 50 DDIM steps")
    axes.legend(fontsize=7)
    return figure


def _loops(rows: Sequence[Row]) -> Figure:
    by_model: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in rows:
        kind, _, steps = r["workload"].rpartition(", ")
        by_model.setdefault(kind, {}).setdefault(r["contender"], []).append((int(steps.split()[0]), 1e3 * r["seconds"]))
    figure = _figure(4 * len(by_model), 4)
    for place, (kind, contenders) in enumerate(by_model.items()):
        axes = figure.add_subplot(1, len(by_model), place + 1)
        for contender, points in contenders.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=contender)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("steps")
        axes.set_ylabel("time of a loop, ms")
        axes.set_ylim(0, 1.1 * max(y for points in contenders.values() for _, y in points))
        axes.set_xlim(left=0)
    figure.axes[0].legend(fontsize=7)
    return figure


def _growth(rows: Sequence[Row]) -> Figure:
    figure = _figure(3.2 * len(rows), 3.2)
    for place, r in enumerate(rows):
        axes = figure.add_subplot(1, len(rows), place + 1)
        x, seconds = zip(*r["points"], strict=True)
        axes.plot(x, [1e6 * s for s in seconds], "o", label="measured")
        ends = (0, x[-1])
        axes.plot(ends, [1e6 * (r["seconds_fixed"] + r["seconds_each"] * end) for end in ends], "-", label="line")
        axes.set_title(f"R^2 = {r['r_squared']:.4f}", fontsize=9)
        axes.set_xlabel(r["against"])
        axes.set_ylabel("time, us")
        axes.set_ylim(0, 1.1e6 * max(seconds))
    figure.axes[0].legend(fontsize=7)
    return figure


def _guidance(rows: Sequence[Row]) -> Figure:
    costs, quality = ([r for r in rows if r["what"] == what] for what in ("cost", "quality"))
    figure = _figure(12, 3.6)
    panels = (
        (costs, "parameters", "seconds_per_image_step", 1e6, "one step per image, us"),
        (costs, "parameters", "peak_bytes_per_image", 1 / 1024, "peak memory per image, KiB"),
        (quality, "diversity", "agreement", 1.0, "agreement"),
    )
    for place, (shown, across, up, factor, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for method in dict.fromkeys(r["method"] for r in shown):
            points = [(r[across], factor * r[up]) for r in shown if r["method"] == method]
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
        if shown is quality:
            axes.margins(x=0.15)
            for r in shown:
                point = (r[across], r[up])
                axes.annotate(f"scale {r['scale']:g}", point, fontsize=7, xytext=(4, 3), textcoords="offset points")
        else:
            axes.set_xscale("log")
            axes.set_ylim(0, 1.1 * factor * max((r[up] for r in shown), default=1.0))
        axes.set_xlabel(f"model's {across}" if across == "parameters" else across)
        axes.set_ylabel(label)
        axes.legend(fontsize=7)
    return figure
