"""Add up what tests found, over all folders and for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_VERSIONS = ("date", "device", "python", "torch", "fastguide", "backend", "diffusers", "transformers", "peft")


def summary(folders: Mapping[str, Any], made: Iterable[str]) -> dict[str, Any]:
    """Add up the findings of all folders.

    Args:
        folders: what ``examined`` returned for each.
        made: the names of all pipeline classes of diffusers.
    """
    verdicts = [test for folder in folders.values() for test in folder["tests"].values()]
    rows = [(name, row) for folder in folders.values() for name, row in folder["pipelines"].items()]
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
        "counts that differ": sum(len(row["counts_differ"]) for _, row in rows),
        "steps with guidance": sum(row["guided_plain"] for _, row in rows),
        "steps": _steps(row for _, row in rows),
    }


def with_setting(found: Mapping[str, Any], machine: Mapping[str, Any], expression: str) -> dict[str, Any]:
    """Return findings of folders with what they were found with: date, versions, and the expression that chose tests.

    A report goes on where its file stops, so that its folders may have been run on different days.
    """
    setting = {**{name: machine[name] for name in _VERSIONS if name in machine}, "expression": expression}
    return {name: {**folder, "setting": setting} for name, folder in found.items()}


def reached(folders: Mapping[str, Any]) -> dict[str, Any]:
    """Return the folders of a report but those that a process was to run and did not come to."""
    return {name: folder for name, folder in folders.items() if folder["tests"] or not folder["wrong"]}


def brief(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without its tests and pipelines: the versions, the summary, and each folder's numbers.

    Nothing of it depends on where the tests or the packages lie.
    """
    machine = {name: report["machine"][name] for name in _VERSIONS if name in report["machine"]}
    setting = {**machine, "expression": report["expression"]}
    return {
        "machine": machine,
        "expression": report["expression"],
        "summary": report["summary"],
        "folders": {name: _numbers(folder, setting) for name, folder in report["folders"].items()},
    }


def _numbers(folder: Mapping[str, Any], setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many tests of a folder had each outcome, and how many calls were compared and differ.

    ``"plain failures"`` are those that fail without fastguide too, by the kind of error; ``"setting"`` is what is not
    as this one.
    """
    failures = [test for test in folder["tests"].values() if test["outcome"] == "fails plain too"]
    rows = list(folder["pipelines"].values())
    found: dict[str, Any] = dict(Counter(test["outcome"] for test in folder["tests"].values()))
    found |= {"calls": sum(row["calls"] for row in rows), "compared": sum(row["compared"] for row in rows)}
    found |= {what: sum(len(row[what]) for row in rows) for what in ("differ", "errors_differ", "counts_differ")}
    found |= {"largest": float(f"{max((row['largest'] for row in rows), default=0.0):.0e}")}
    found |= {"steps": _steps(rows), "steps with guidance": sum(row["guided_plain"] for row in rows)}
    if failures:
        found["plain failures"] = dict(Counter(_kind(test["message"]) for test in failures))
    if folder["wrong"]:
        found["stopped"] = len(folder["wrong"])
    found["setting"] = {name: value for name, value in folder["setting"].items() if value != setting.get(name)}
    return found


def _steps(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many steps had each thing done to them, the most frequent first."""
    steps: Counter[str] = Counter()
    for row in rows:
        steps.update(row["steps"])
    return dict(steps.most_common())


def _kind(message: str) -> str:
    """Return the kind of error that a message begins with."""
    name = message.partition(":")[0].strip()
    return name.rpartition(".")[2] if name.replace(".", "").isidentifier() else "other"


def _fused(row: Mapping[str, Any], kind: str) -> bool:
    return any(what.startswith(kind) for what in row["steps"])
