"""Test the targets: no row that is missing, wrong or slow hides a miss."""

from __future__ import annotations

import pytest

from benchmarks.report import pages, targets
from tests.support.bench_rows import ok, rows_of_a_run


def test_targets_are_met_missed_or_not_run():
    judged = targets.judged(rows_of_a_run(), "cpu")
    assert [row["status"] for row in judged] == ["met"] * 4 + ["missed", "not run"] + ["met"] * 28
    worse = targets.judged(rows_of_a_run(2.0), "cpu")
    assert [row["status"] for row in worse] == [*["missed"] * 5, "not run", *["met"] * 28]
    assert all(row["status"] == "not run" and row["reason"] for row in targets.judged([], "cpu"))
    assert len(targets.judged([], "cuda")) == len(judged) + 4
    text = pages.terminal([*rows_of_a_run(2.0), *worse], colour=False)
    assert text.count("missed") == 5
    reasons = {row["target"].partition(":")[0]: row["reason"] for row in worse if row["status"] == "missed"}
    assert reasons["a small step"].startswith("the rest is Python")
    assert reasons["a large step into out=, over copy_ of the same bytes"] == "unexplained"
    far = [row for row in targets.judged(rows_of_a_run(9.0), "cpu") if row["status"] == "missed"]
    assert {row["reason"] for row in far if "scheduler" not in row["target"]} == {"unexplained"}


LARGE_COMPILED = (targets._LARGE, "torch.compile")


def test_a_row_that_is_missing_hides_no_miss():
    """A missing row of any workload, or of any mode of torch.compile, cannot turn a miss into a success."""
    (new,) = [r for r in targets.judged(rows_of_a_run(1.1), "cpu") if r["target"].startswith("a step into a new")]
    assert new["status"] == "missed"
    for status, expected in (("not run", "not run"), ("wrong", "missed")):
        for contender in ("fastguide", "torch.compile"):
            rows = [
                row | {"status": status, "reason": "why"}
                if (row.get("workload"), row.get("contender")) == (targets._LARGE, contender)
                else row
                for row in rows_of_a_run(1.1)
                if row.get("contender") != "torch.compile max-autotune"
            ]
            (new,) = [r for r in targets.judged(rows, "cpu") if r["target"].startswith("a step into a new")]
            assert new["status"] == (expected if contender == "fastguide" else "not run")
    elsewhere = [row for row in rows_of_a_run() if (row.get("workload"), row.get("contender")) != LARGE_COMPILED]
    slow = [*elsewhere, ok("w", "fastguide", 9.0), ok("w", "torch.compile", 1.0)]
    (new,) = [r for r in targets.judged(slow, "cpu") if r["target"].startswith("a step into a new")]
    assert (new["status"], new["measured"]) == ("missed", 9.0)
    broken = [*elsewhere, ok("w", "fastguide", 9.0) | {"status": "wrong", "reason": "why"}]
    (new,) = [r for r in targets.judged(broken, "cpu") if r["target"].startswith("a step into a new")]
    assert (new["status"], new["reason"]) == ("missed", "fastguide is wrong: why")
    faster = [*rows_of_a_run(), ok(targets._SMALL, "torch.compile max-autotune out=", 0.05)]
    (step,) = [r for r in targets.judged(faster, "cpu") if r["target"].startswith("a step into out=")]
    assert (step["status"], step["measured"]) == ("missed", pytest.approx(2.0))
    assert (step["slowest"], step["reason"]) == (targets._SMALL, "unexplained")
    assert f"{targets._SMALL}; unexplained" in pages.terminal([step], colour=False)


def test_only_what_waits_for_the_memory_is_excused_by_it():
    for size, reason in (
        (8, "unexplained"),
        (2e8, "the step waits for the memory, where two runs differ by some percent"),
    ):
        rows = [ok("w", c, s) | {"bytes": size} for c, s in (("fastguide", 1.05), ("torch.compile", 1.0))]
        (new,) = [r for r in targets.judged(rows, "cpu") if r["target"].startswith("a step into a new")]
        assert (new["status"], new["slowest"], new["reason"]) == ("missed", "w", reason)


def test_a_rival_that_fails_makes_no_target_easier():
    """A mode that this device does not have is not needed."""
    broken = ok(targets._SMALL, "torch.compile max-autotune", 1.0) | {"status": "not run", "reason": "why"}
    for row, expected in (
        (broken, "met"),
        (broken | {"raised": True}, "not run"),
        (broken | {"status": "wrong"}, "not run"),
    ):
        judged = targets.judged([*rows_of_a_run(), row], "cpu")
        (new,) = [r for r in judged if r["target"].startswith("a step into a new")]
        assert new["status"] == expected
        if expected == "not run":
            assert new["reason"] == f"needs 'torch.compile max-autotune' of {targets._SMALL!r}: why"
