"""Write the report: tables for the terminal and as Markdown, and one HTML page that also holds the plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .plots import plots

Row = dict[str, Any]

_RED, _GREEN, _PLAIN = "\033[31m", "\033[32m", "\033[0m"
_BAD = ("missed", "wrong", "worse", "failed", "disturbed", "interrupted", "unsure")
_UNSTEADY = 2.0  # slowest over fastest tenth, from which on a median says little

_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}.bad{color:#b00020;font-weight:bold}"
    "img{max-width:100%;display:block;margin:1em 0}"
)


class Table(NamedTuple):
    """A title, a head, lines with their status, and the notes below them."""

    title: str
    head: list[str]
    body: list[tuple[str, list[str]]]
    notes: Sequence[str] = ()


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Yield a table for each workload and each suite that has rows; the targets come last."""
    for suite in ("steps", "solvers", "moments", "loops", "ranks", "pipelines"):
        for workload in dict.fromkeys(row["workload"] for row in rows if row["suite"] == suite):
            yield _times(workload, [r for r in rows if r["suite"] == suite and r["workload"] == workload])
    for suite, table in (
        ("accuracy", _accuracy),
        ("growth", _growth),
        ("guidance", _guidance),
        ("the suite", _notes),
        ("compared", _compared),
        ("targets", _targets),
    ):
        found = [row for row in rows if row["suite"] == suite]
        if found:
            yield from table(found)


def _times(workload: str, rows: Sequence[Row]) -> Table:
    """List the contenders by their time, without the columns that are empty."""
    other = "one process" if rows[0]["suite"] == "ranks" else "diffusers"
    bases = {"diffusers", "Sampler, one process"}
    base = next((r["seconds"] for r in rows if r["contender"] in bases and r["status"] == "ok"), None)
    head = ["", "median", f"faster than {other}", "bandwidth", "tenths", ""]
    body: list[tuple[str, list[str]]] = []
    reasons: dict[str, list[str]] = {}
    for r in sorted(rows, key=lambda r: r.get("seconds", float("inf"))):
        if r["status"] == "not run":
            reasons.setdefault(r["reason"], []).append(r["contender"])
            continue
        if r["status"] != "ok":
            body.append((r["status"], [r["contender"], r["status"], "", "", "", r["reason"]]))
            continue
        share = f"{r['share_of_copy']:.0%} of copy_" if "share_of_copy" in r else ""
        ratio = f"{base / r['seconds']:.2f} x" if base is not None else ""
        spread = f"{_time(r['p10'])} .. {_time(r['p90'])}" if "p10" in r else ""
        more = ["unsteady"] if "p10" in r and r["p90"] > _UNSTEADY * r["p10"] else []
        more += [f"host {_time(r['host_seconds'])}"] if "host_seconds" in r else []
        if "less_of_the_processor" in r:
            more.append(f"{r['less_of_the_processor']:.2f} x by the processor's time")
            more.append(f"others used {r['others']:.0%}")
        if "bytes_sent_a_step" in r:
            sent, gathers = r["bytes_sent_a_step"] / 1024, _time(r["seconds_of_gathers_a_step"])
            more += [f"{sent:.0f} KiB a step to the other process, {gathers} alone"]
        body.append(("ok", [r["contender"], _time(r["seconds"]), ratio, share, spread, ", ".join(more)]))
    used = [c for c in range(len(head)) if any(cells[c] for _, cells in body)]
    body = [(status, [cells[c] for c in used]) for status, cells in body]
    notes = [f"not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return Table(workload, [head[c] for c in used], body, notes)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _accuracy(rows: Sequence[Row]) -> Iterator[Table]:
    head = ["solver", "model's dtype", "", "relative error", "one step, noise given"]
    body = []
    for r in rows:
        result = [f"{r['error']:.2e}", _time(r["seconds"])] if r["status"] == "ok" else [r["reason"], ""]
        body.append((r["status"], [r["solver"], r["dtype"], r["contender"], *result]))
    yield Table("50 guided steps against float64", head, body)


def _growth(rows: Sequence[Row]) -> Iterator[Table]:
    head = ["time against", "each", "fixed", "R^2", "upper half steeper", ""]
    body = []
    for r in rows:
        if r["status"] == "ok":
            line = [f"{1e6 * r['seconds_each']:.4g} us", f"{1e6 * r['seconds_fixed']:.3g} us", f"{r['r_squared']:.4f}"]
            line += [f"{r['bend']:.2f} x", "linear" if r["linear"] else "not linear"]
        else:
            line = [r["status"], r["reason"], "", "", ""]
        body.append((r["status"], [r["against"], *line]))
    yield Table("Cost by growth", head, body)


def _guidance(rows: Sequence[Row]) -> Iterator[Table]:
    costs = [
        (
            r["status"],
            [
                r["method"],
                str(r["parameters"]),
                _time(r["seconds_per_image_step"]),
                f"{r['peak_bytes_per_image'] / 1024:.0f} KiB",
            ],
        )
        for r in rows
        if r.get("what") == "cost"
    ]
    if costs:
        head = ["guidance", "model's parameters", "one step per image", "peak memory per image"]
        yield Table("Both kinds of guidance, as the models grow", head, costs)
    quality = [
        (
            r["status"],
            [
                r["method"],
                f"{r['scale']:g}",
                f"{r['agreement']:.1%}",
                f"{r['diversity']:.2f}",
                _time(r["seconds_per_image"]),
            ],
        )
        for r in rows
        if r.get("what") == "quality"
    ]
    if quality:
        head = ["guidance", "scale", "agreement", "diversity", "time per image"]
        yield Table("Both kinds of guidance, on digits", head, quality)
    reasons = dict.fromkeys((r["status"], r["reason"]) for r in rows if r["status"] != "ok")
    if reasons:
        yield Table("Both kinds of guidance", ["", ""], [(status, [status, reason]) for status, reason in reasons])


def _notes(rows: Sequence[Row]) -> Iterator[Table]:
    body = [(r["status"], [r["workload"], r["status"], r["reason"]]) for r in rows]
    yield Table("Notes on this run", ["", "", ""], body)


def _compared(rows: Sequence[Row]) -> Iterator[Table]:
    body = []
    for r in rows:
        ratios = [f"{r[which]:.3g}" if which in r else "" for which in ("then", "now")]
        body.append((r["status"], [r["workload"], r["contender"], *ratios, r.get("reason", r["status"])]))
    yield Table("Time, or error, over that of the baseline in the same run", ["", "", "then", "now", ""], body)


def _targets(rows: Sequence[Row]) -> Iterator[Table]:
    body = []
    for r in rows:
        measured = f"{r['measured']:.3g}" if "measured" in r else ""
        remark = "; ".join(r[key] for key in ("slowest", "reason") if key in r)
        body.append((r["status"], [r["target"], r["expected"], measured, r["status"], remark]))
    yield Table("Targets", ["", "expected", "measured", "", ""], body)


def terminal(rows: Sequence[Row], colour: bool) -> str:
    """Return all tables as text, the targets at the end; what is wrong, missed or worse is red."""
    lines: list[str] = []
    for title, head, body, notes in tables(rows):
        widths = [max(len(line[c]) for line in [head, *(b for _, b in body)]) for c in range(len(head))]
        lines += ["", title, ("  " + "  ".join(map(str.ljust, head, widths))).rstrip()]
        for status, cells in body:
            text = ("  " + "  ".join(map(str.ljust, cells, widths))).rstrip()
            if colour and status in _BAD:
                text = f"{_RED}{text}{_PLAIN}"
            elif colour and status == "met":
                text = f"{_GREEN}{text}{_PLAIN}"
            lines.append(text)
        lines += [f"  {note}" for note in notes]
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """Return all tables as Markdown; what is wrong, missed or worse is bold."""
    parts = []
    for title, head, body, notes in tables(rows):
        lines = [f"{title}:", ""] + ([f"| {' | '.join(head)} |", "|---" * len(head) + "|"] if body else [])
        for status, cells in body:
            texts = [f"**{cell}**" if cell and status in _BAD else cell for cell in cells]
            lines.append(f"| {' | '.join(texts)} |")
        lines += [part for note in notes for part in ("", note)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``index.html``, its plots, and ``tables.md``; returns the page and the plots.

    Without matplotlib, the page says that it has no plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(markdown(results["rows"]))
    written, images = [], []
    try:
        figures = list(plots(results["rows"]))
        missing = ""
    except ImportError:
        figures, missing = [], "<p class=bad>no plots: matplotlib is not installed</p>"
    for name, figure in figures:
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130, bbox_inches="tight")
        path = folder / f"{name}.png"
        path.write_bytes(data.getvalue())
        written.append(path)
        images.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">')
    parts = [_html(table) for table in tables(results["rows"]) if table.title != "Targets"]
    first = [_html(table) for table in tables(results["rows"]) if table.title == "Targets"]
    machine = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in results["machine"].items())
    page = folder / "index.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>fastguide's benchmarks</title><style>{_STYLE}</style>"
        f"<h1>fastguide's benchmarks</h1><ul>{machine}</ul>{missing}{''.join([*first, *images, *parts])}\n"
    )
    return [page, *written]


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    lines = [
        f"<tr class={'bad' if status in _BAD else 'ok'}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for status, cells in table.body
    ]
    part = f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{''.join(lines)}</table>"
    return part + "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
