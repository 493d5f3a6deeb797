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
            | {"guided_plain": 0, "largest": 0.0, "differ": [], "errors_differ": [], "counts_differ": []},
        )
        row["calls"] += 1
        row["steps"].update(record["counts"])
        row["computed"].update(record["computed"])
        row["tried"] = sorted({*row["tried"], *record["tried"]})
        row["left_alone"].update(record["left_alone"])
        _compare(row, record)
        _compare_counts(row, record)
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


def _compare_counts(row: dict[str, Any], record: Record) -> None:
    """Add a call whose ``Acceleration.counts`` are not the steps, or the guidance, of the plain call.

    Guidance may be fused in fewer steps than had it, if ``Acceleration.computed`` names what the pipeline computed.
    """
    steps, counts = record.get("plain_steps"), record["counts"]
    if steps is None or "errors" in record or record["left_alone"]:
        return
    row["guided_plain"] += steps["guided"]
    fused = counts.get("fused with guidance", 0)
    fewer = fused < steps["guided"] and not record["computed"]
    if sum(counts.values()) != steps["made"] or fused > steps["guided"] or fewer:
        row["counts_differ"].append({"test": record["test"], "plain": steps, "accelerated": counts})
