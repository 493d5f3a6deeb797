"""Say what tests found: the outcome of each test with and without fastguide, and each pipeline's steps and outputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .calls import Record
from .runs import calls, outcomes

TOLERANCE = {32: 1e-4, 64: 1e-4, 16: 0.05, 8: 0.05}
"""The difference of outputs that is rounding, over their largest value, by the bits of the models' weights."""
_TIMES_ROUNDING = 5
"""How many times as much outputs may differ as those of a plain call whose samples are rounded anew."""
Runs = Callable[[str, Sequence[str]], tuple[list[Record], str]]
"""Runs tests in a mode."""


def examined(run: Runs, folders: Sequence[str], plain_too: bool = False) -> dict[str, dict[str, Any]]:
    """Run folders of tests compared, and the tests that fail accelerated and plain.

    Args:
        run: which runs them.
        folders: the folders, in whose processes they run together.
        plain_too: run all tests plain, not only those that fail otherwise.

    Returns:
        The findings of each folder. ``tests``: the outcome of each, ``broken`` if it passes without acceleration alone.
        ``pipelines``: the figures of each class. ``wrong``: of the processes.
    """
    records, wrong = run("compared", folders)
    found = {test: str(record["outcome"]) for test, record in outcomes(records).items()}
    wrongs = [wrong]
    failed = [test for test, outcome in found.items() if outcome == "failed"]
    again: dict[str, dict[str, Record]] = {"accelerated": {}, "plain": {}}
    for mode, ran in again.items():
        chosen = list(folders) if plain_too and mode == "plain" else failed
        if chosen:
            reports, wrong = run(mode, chosen)
            ran.update(outcomes(reports))
            wrongs.append(wrong)
    verdicts = {test: _verdict(test, outcome, again) for test, outcome in found.items()}
    return {
        folder: {
            "tests": {test: verdict for test, verdict in verdicts.items() if test.startswith(f"{folder}/")},
            "pipelines": by_pipeline(each for each in calls(records) if each["test"].startswith(f"{folder}/")),
            "wrong": [each for each in wrongs if each],
        }
        for folder in folders
    }


def _verdict(test: str, compared: str, again: Mapping[str, Mapping[str, Record]]) -> dict[str, str]:
    accelerated = compared if compared != "failed" else _outcome(again["accelerated"], test)
    plain = _outcome(again["plain"], test)
    verdict = {"compared": compared, "accelerated": accelerated, "plain": plain}
    if accelerated == "failed":
        verdict["outcome"] = (
            "broken" if plain == "passed" else "fails plain too" if plain == "failed" else "not compared"
        )
        verdict["message"] = str(again["accelerated"][test].get("message", ""))
    else:
        verdict["outcome"] = accelerated
    return verdict


def _outcome(ran: Mapping[str, Record], test: str) -> str:
    return str(ran[test]["outcome"]) if test in ran else "not run"


def by_pipeline(records: Iterable[Record]) -> dict[str, Any]:
    """Return the figures of each pipeline class: its calls, its steps, and where its outputs differ."""
    found: dict[str, Any] = {}
    for record in records:
        row = found.setdefault(
            record["pipeline"],
            {"calls": 0, "compared": 0, "steps": Counter(), "computed": Counter(), "tried": [], "left_alone": {}}
            | {"largest": 0.0, "differ": [], "errors_differ": []},
        )
        row["calls"] += 1
        row["steps"].update(record["counts"])
        row["computed"].update(record["computed"])
        row["tried"] = sorted({*row["tried"], *record["tried"]})
        row["left_alone"].update(record["left_alone"])
        _compare(row, record)
    return dict(sorted(found.items()))


def _compare(row: dict[str, Any], record: Record) -> None:
    """Add what a call's comparison found."""
    errors = record.get("errors")
    if errors is not None and errors[0] != errors[1]:
        row["errors_differ"].append({"test": record["test"], "plain": errors[0], "accelerated": errors[1]})
    apart = record.get("difference")
    if apart is None:
        return
    row["compared"] += bool(record["varies"])
    tolerance = max(TOLERANCE[record["bits"]], _TIMES_ROUNDING * record.get("rounding", 0.0))
    if apart > tolerance or math.isnan(apart):
        row["differ"].append({"test": record["test"], "difference": apart, "rounding": record.get("rounding")})
    elif record["bits"] >= 32:
        row["largest"] = max(row["largest"], apart)


def summary(folders: Mapping[str, Any], made: Iterable[str]) -> dict[str, Any]:
    """Add up the findings of all folders.

    Args:
        folders: what ``examined`` returned for each.
        made: the names of all pipeline classes of diffusers.
    """
    verdicts = [test for folder in folders.values() for test in folder["tests"].values()]
    rows = [(name, row) for folder in folders.values() for name, row in folder["pipelines"].items()]
    steps: Counter[str] = Counter()
    for _, row in rows:
        steps.update(row["steps"])
    covered = {name for name, _ in rows} & set(made)
    return {
        "pipelines": len(set(made)),
        "called": len(covered),
        "compared": len({name for name, row in rows if row["compared"]} & covered),
        "with steps fused": len({name for name, row in rows if _fused(row, "fused")} & covered),
        "with guidance fused": len({name for name, row in rows if _fused(row, "fused with guidance")} & covered),
        "not called": sorted(set(made) - covered),
        "tests": dict(Counter(verdict["outcome"] for verdict in verdicts)),
        "tests passed plain": sum(verdict["plain"] == "passed" for verdict in verdicts),
        "calls": sum(row["calls"] for _, row in rows),
        "calls compared": sum(row["compared"] for _, row in rows),
        "calls that differ": sum(len(row["differ"]) for _, row in rows),
        "errors that differ": sum(len(row["errors_differ"]) for _, row in rows),
        "steps": dict(steps.most_common()),
    }


def _fused(row: Mapping[str, Any], kind: str) -> bool:
    return any(what.startswith(kind) for what in row["steps"])
