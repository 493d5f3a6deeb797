"""Test the measurement of two processes: they agree with one before they are timed, and what is wrong is not."""

from __future__ import annotations

import os

import pytest

from benchmarks import suites
from benchmarks.measure import ranks as measured
from benchmarks.report import machine, pages
from tests.support import rank_benchmarks, ranks


@pytest.mark.xdist_group("ranks")  # one server forks the processes of all
def test_two_processes_agree_with_one_before_they_are_timed():
    """And one that does not is not timed."""
    for plain, one_by_one, wrong in ranks.run(2, rank_benchmarks.rows):
        names = [measured.ONE, measured.PREDICTIONS, measured.AT_ONCE, measured.SAMPLES]
        assert [row["contender"] for row in one_by_one] == names
        assert [row["contender"] for row in plain] == [name for name in names if name != measured.AT_ONCE]
        assert {row["status"] for row in (*plain, *one_by_one)} == {"ok"}
        statuses = {row["contender"]: row["status"] for row in wrong}
        assert statuses == {measured.PREDICTIONS: "wrong", measured.ONE: "ok", measured.SAMPLES: "ok"}
        for shared, sent in ((plain[1], 1), (one_by_one[1], 2)):
            assert shared["bytes_sent_a_step"] == sent * 2 * 16 * 7 * 4
            assert f"{shared['bytes_sent_a_step'] / 1024:.0f} KiB a step" in pages.terminal([shared], colour=False)
        assert plain[1]["faster_than_one"] == pytest.approx(plain[0]["seconds"] / plain[1]["seconds"])
        assert "faster than one process" in pages.markdown(plain)


def test_loops_of_several_processes_are_chosen_by_their_titles():
    assert len(set(suites.chosen_ranks([]))) == len(measured.WORKLOADS)
    assert suites.chosen_ranks(["ranks: small DiT"]) == [measured.WORKLOADS[2].title]


def test_what_others_use_is_what_is_used_and_not_ours():
    second = os.sysconf("SC_CLK_TCK")
    before, after = (100, 40), (100 + 2 * second, 40 + second)  # two processors, of which one was idle
    assert machine.share_of_others(before, after, 0.5) == pytest.approx(0.25)
    assert machine.share_of_others(before, after, 1.5) == 0  # ticks are coarse
    assert machine.share_of_others(before, before, 0.0) == machine.share_of_others(None, None, 1.0) == 0
