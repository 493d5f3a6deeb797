"""Write the report: two shares, what they are made of, and what is not served or not fused, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import diffusers

from .forms import FUSED_FORMS, SEEN_THROUGH
from .rows import Row, shares


def report(rows: Sequence[Row]) -> str:
    """Return the whole report of rows."""
    parts = (_summary(rows), _by_scheduler(rows), _by_form(rows), _in_the_way(rows), _left(rows))
    return "\n\n".join("\n".join(part) for part in parts)


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    yield f"diffusers {diffusers.__version__}: {len(rows)} pipeline classes with a scheduler, by their source"
    yield ""
    current = shares([row for row in rows if not row.deprecated])
    all_of_them = shares(rows)
    for title, count, of_current in (
        ("default scheduler served", all_of_them.served, current.served),
        ("fully fused", all_of_them.fully_fused, current.fully_fused),
        ("  guidance of several predictions", all_of_them.guided, current.guided),
        ("  by the form of guidance alone", all_of_them.form_fused, current.form_fused),
    ):
        yield (
            f"{title:32} {_share(count, all_of_them.pipelines)}    without deprecated ones "
            f"{_share(of_current, current.pipelines)}"
        )
    yield ""
    yield "Fully fused: the scheduler is served, and guidance is fused with its step or there is none."
    yield f"Default schedulers known by {_counts(row.by or 'nothing' for row in rows)}"
    origins = (row.origin.partition(": ")[2] for row in rows if row.origin)
    yield f"Those known by checkpoint are from {_counts(origins)}"
    yield f"guidance_rescale, 0 by default, makes another form: {sum(row.rescales_on_demand for row in rows)}"
    on_demand = [row.on_demand for row in rows if row.on_demand is not None]
    unfused = sum(not guidance.fused for guidance in on_demand)
    yield f"Embedded guidance, and on demand that of a second call: {len(on_demand)}, of which {unfused} not fused"


def _by_scheduler(rows: Sequence[Row]) -> Iterator[str]:
    yield from _table("default scheduler", rows, lambda row: row.scheduler, "by")
    yield "by: __init__'s annotation; init, if it exchanges others; the docstring's example; its checkpoint (a table)"


def _by_form(rows: Sequence[Row]) -> Iterator[str]:
    yield from _table(
        "form of guidance", rows, lambda row: _form(row) if FUSED_FORMS[row.form] else f"{row.form} (not fused)"
    )


def _table(title: str, rows: Sequence[Row], name: Callable[[Row], str], by: str = "") -> Iterator[str]:
    yield f"{title:34} pipelines  served  guidance fused  fully fused  {by}".rstrip()
    for key, _ in Counter(map(name, rows)).most_common():
        chosen = [row for row in rows if name(row) == key]
        counted, fused = shares(chosen), sum(row.fused for row in chosen)
        origins = _counts(row.by or "nothing" for row in chosen) if by else ""
        yield (
            f"{key:34} {counted.pipelines:9}  {counted.served:6}  {fused:14}  {counted.fully_fused:11}  {origins}"
        ).rstrip()


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def _in_the_way(rows: Sequence[Row]) -> Iterator[str]:
    """Tell what is done to predictions whose form of guidance would be fused, and how often that alone is done."""
    chosen = [row for row in rows if row.served and not row.fused and FUSED_FORMS[row.form]]
    counted = Counter(change for row in chosen for change in row.changes if change not in SEEN_THROUGH)
    yield f"{'in the way of a form that is fused':34} pipelines  alone in the way"
    for change, count in counted.most_common():
        alone = sum(set(row.changes) - SEEN_THROUGH == {change} for row in chosen)
        yield f"{change:34} {count:9}  {alone:16}"


def _left(rows: Sequence[Row]) -> Iterator[str]:
    left = [row for row in rows if row.reasons]
    yield f"not served or not fused: {len(left)} (default scheduler; form of guidance; what is in the way)"
    for row in left:
        scheduler = f"{row.scheduler} (by {row.by or 'nothing'})"
        yield f"{row.pipeline:48} {scheduler}; {_form(row)}; {', '.join(row.reasons)}"


def _form(row: Row) -> str:
    return f"{row.form}, {row.calls}" if row.calls else row.form


def _share(count: int, of: int) -> str:
    return f"{count:3} of {of}, {100 * count / max(of, 1):5.1f} %"
