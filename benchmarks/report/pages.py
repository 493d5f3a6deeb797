"""The report: tables in the terminal, as Markdown, and with the plots in one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .plots import plots

Row = dict[str, Any]

_RED, _GREEN, _PLAIN = "\033[31m", "\033[32m", "\033[0m"
_BAD = ("missed", "wrong", "worse", "failed", "disturbed", "interrupted", "unsure")


class Table(NamedTuple):
    """Lines with their status, and what is said below them."""

    title: str
    head: list[str]
    body: list[tuple[str, list[str]]]
    notes: Sequence[str] = ()


def terminal(rows: Sequence[Row], colour: bool) -> str:
    """All that was measured, and at its end what was promised; a miss is red, and is never left out."""
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


_UNSTEADY = 2.0  # the slowest tenth over the fastest, from which on a median says little


def tables(rows: Sequence[Row]) -> Iterable[Table]:
    """Each a title, a head, and lines with their status."""
    for suite in ("steps", "loops"):
        for workload in dict.fromkeys(row["workload"] for row in rows if row["suite"] == suite):
            yield _times(workload, [r for r in rows if r["suite"] == suite and r["workload"] == workload])
    found = [r for r in rows if r["suite"] == "accuracy"]
    if found:
        body = [(r["status"], [r["solver"], r["dtype"], r["contender"], *_error(r)]) for r in found]
        head = ["solver", "model's dtype", "", "relative error", "a step, its noise at hand"]
        yield Table("50 guided steps against float64", head, body)
    found = [r for r in rows if r["suite"] == "growth"]
    if found:
        head = ["time against", "each", "fixed", "R^2", "upper half steeper", ""]
        yield Table("Cost by growth", head, [(r["status"], [r["against"], *_growth(r)]) for r in found])
    found = [r for r in rows if r["suite"] == "methods" and r.get("what") == "cost"]
    if found:
        body = [
            (
                r["status"],
                [r["method"], str(r["parameters"]), _time(r["seconds_per_image_step"]),
                 f"{r['peak_bytes_per_image'] / 1024:.0f} KiB"],
            )
            for r in found
        ]  # fmt: skip
        head = ["guidance", "model's parameters", "an image's step", "peak memory an image"]
        yield Table("Both guidance methods, as the models grow", head, body)
    found = [r for r in rows if r["suite"] == "methods" and r.get("what") == "quality"]
    if found:
        body = [
            (
                r["status"],
                [r["method"], f"{r['scale']:g}", f"{r['agreement']:.1%}", f"{r['diversity']:.2f}",
                 _time(r["seconds_per_image"])],
            )
            for r in found
        ]  # fmt: skip
        head = ["guidance", "scale", "agreement", "diversity", "an image"]
        yield Table("Both guidance methods, on digits", head, body)
    found = [r for r in rows if r["suite"] == "methods" and r["status"] != "ok"]
    if found:
        reasons = dict.fromkeys((r["status"], r["reason"]) for r in found)
        yield Table("Both guidance methods", ["", ""], [(status, [status, reason]) for status, reason in reasons])
    found = [r for r in rows if r["suite"] == "the suite"]
    if found:
        body = [(r["status"], [r["workload"], r["status"], r["reason"]]) for r in found]
        yield Table("What to know of this run", ["", "", ""], body)
    found = [r for r in rows if r["suite"] == "compared"]
    if found:
        body = [
            (
                r["status"],
                [
                    r["workload"],
                    r["contender"],
                    *(f"{r[k]:.3g}" if k in r else "" for k in ("then", "now")),
                    r.get("reason", r["status"]),
                ],
            )
            for r in found
        ]
        title = "Time, or error, over the baseline's of the same run, then and now"
        yield Table(title, ["", "", "then", "now", ""], body)
    found = [r for r in rows if r["suite"] == "targets"]
    if found:
        body = [
            (r["status"], [r["target"], r["expected"], f"{r['measured']:.3g}" if "measured" in r else "", r["status"],
                           "; ".join(r[key] for key in ("slowest", "reason") if key in r)])
            for r in found
        ]  # fmt: skip
        yield Table("Targets", ["", "expected", "measured", "", ""], body)


def _growth(r: Row) -> list[str]:
    if r["status"] != "ok":
        return [r["status"], r["reason"], "", "", ""]
    line = [f"{1e6 * r['seconds_each']:.4g} us", f"{1e6 * r['seconds_fixed']:.3g} us", f"{r['r_squared']:.4f}"]
    return [*line, f"{r['bend']:.2f} x", "linear" if r["linear"] else "not linear"]


def _times(workload: str, rows: Sequence[Row]) -> Table:
    """A line for each that was measured or should have been, without the columns that nothing is in."""
    base = next((r["seconds"] for r in rows if r["contender"] == "diffusers" and r["status"] == "ok"), None)
    head = ["", "median", "faster than diffusers", "bandwidth", "tenths", ""]
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
        body.append(("ok", [r["contender"], _time(r["seconds"]), ratio, share, spread, ", ".join(more)]))
    used = [c for c in range(len(head)) if any(cells[c] for _, cells in body)]
    body = [(status, [cells[c] for c in used]) for status, cells in body]
    notes = [f"not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return Table(workload, [head[c] for c in used], body, notes)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _error(row: Row) -> list[str]:
    return [f"{row['error']:.2e}", _time(row["seconds"])] if row["status"] == "ok" else [row["reason"], ""]


def markdown(rows: Sequence[Row]) -> str:
    """The tables as a text for a README or an issue; what missed is bold."""
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
    """The page, its plots and the tables as Markdown; without matplotlib, the page says that there are no plots."""
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
    parts: list[str] = []
    for title, head, body, notes in tables(results["rows"]):
        heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = [
            f"<tr class={'bad' if status in _BAD else 'ok'}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for status, cells in body
        ]
        part = f"<h2>{html.escape(title)}</h2><table><tr>{heads}</tr>{''.join(lines)}</table>"
        part += "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        parts.insert(0, part) if title == "Targets" else parts.append(part)
    machine = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in results["machine"].items())
    style = (
        "body{font:14px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}.bad{color:#b00020;font-weight:bold}"
        "img{max-width:100%;display:block;margin:1em 0}"
    )
    page = folder / "index.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>fastguide bench</title><style>{style}</style>"
        f"<h1>fastguide bench</h1><ul>{machine}</ul>{missing}{parts[0] if parts else ''}"
        f"{''.join(images)}{''.join(parts[1:])}\n"
    )
    return [page, *written]
