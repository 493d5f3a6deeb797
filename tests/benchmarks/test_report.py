"""Test the report: a page with everything, results compared by their ratios, and what a busy machine makes unsure."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.report import machine, pages, results, targets
from tests.support.bench_rows import of_bfloat16, ok, rows_of_a_run

CPU = torch.device("cpu")


def test_a_page_holds_everything(tmp_path):
    rows = rows_of_a_run(2.0)
    rows += targets.judged(rows, "cpu")
    found = {"machine": {"torch": "<2>"}, "rows": rows}
    written = pages.write(found, tmp_path)
    page = written[0].read_text()
    assert page.count("<tr class=bad>") == 5
    assert "&lt;2&gt;" in page
    tables = (tmp_path / "tables.md").read_text()
    assert tables.count("**missed**") == 5
    assert "| fastguide out= | 2200.00 ms |" in tables
    assert page.count("data:image/png;base64,") == len(written) - 1
    assert page.index("Targets") < page.index("SD 512")


def test_every_suite_has_its_plot(tmp_path):
    pytest.importorskip("matplotlib")
    points = [[1, 1e-6], [2, 2e-6]]
    line = {"points": points, "seconds_each": 1e-6, "seconds_fixed": 0.0, "r_squared": 1.0, "bend": 1.0, "linear": True}
    method = {"suite": "guidance", "status": "ok", "method": "classifier"}
    rows = [
        *rows_of_a_run(),
        *(ok(f"policy, {n} steps", "diffusers", 1.0, "loops") for n in (20, 50)),
        {"suite": "growth", "status": "ok", "against": "batch", **line},
        method | {"what": "cost", "parameters": 10, "seconds_per_image_step": 1e-6, "peak_bytes_per_image": 1024},
        method | {"what": "quality", "scale": 1.0, "agreement": 0.9, "diversity": 1.0, "seconds_per_image": 1e-3},
    ]
    written = pages.write({"machine": {}, "rows": rows}, tmp_path)
    names = ["speed-up", "roofline", "error-against-speed", "loops", "growth", "guidance"]
    assert [path.stem for path in written[1:]] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def test_what_was_not_run_is_one_line_for_each_reason():
    missing = {"suite": "steps", "workload": "w", "status": "not run"}
    rows = [ok("w", "diffusers", 1.0)] + [missing | {"contender": c, "reason": "why"} for c in ("a", "b")]
    (table,) = pages.tables([*rows, missing | {"contender": "c", "reason": "else"}])
    assert [cells[0] for _, cells in table.body] == ["diffusers"]
    assert table.notes == ["not run: a, b: why", "not run: c: else"]
    alone = [missing | {"contender": "a", "reason": "why"}]
    for text in (pages.terminal(alone, colour=False), pages.markdown(alone)):
        assert "not run: a: why" in text


def test_two_runs_are_compared_by_ratios_within_each():
    """A machine of half the speed is no regression; a contender whose ratio grew is one."""
    run = [row for row in rows_of_a_run() if row["suite"] not in ("pipelines", "solvers", "moments")]
    slow = [row | {"seconds": 2 * row["seconds"]} if "seconds" in row else row for row in run]
    alike = results.compared(slow, run)
    assert {row["status"] for row in alike} == {"alike"}
    assert {row["contender"] for row in alike} == {"fastguide", "fastguide out=", "fastguide's scheduler"}
    steps_alone = [row for row in run if row["suite"] != "accuracy"]
    worse = {row["contender"]: row["status"] for row in results.compared(rows_of_a_run(2.0), steps_alone)}
    assert worse == {"fastguide": "worse", "fastguide out=": "alike", "fastguide's scheduler": "alike"}
    less_exact = [*steps_alone, of_bfloat16("fastguide", 1.5), of_bfloat16("diffusers", 6.0)]
    (row,) = [r for r in results.compared(less_exact, run) if r["status"] == "worse"]
    assert (row["workload"], row["now"]) == ("error of 50 ddim steps, bfloat16", 0.25)
    better = results.compared(run, rows_of_a_run(2.0))
    assert {row["status"] for row in better} == {"better", "alike"}


def test_results_are_read_as_they_were_written(tmp_path):
    found = {"machine": machine.machine(CPU), "rows": rows_of_a_run()}
    results.save(found, tmp_path / "deep" / "a.json")
    assert results.load(tmp_path / "deep" / "a.json")["rows"] == found["rows"]
    (tmp_path / "old.json").write_text(json.dumps({"format": 0, "rows": []}))
    (tmp_path / "none.json").write_text("[]")
    for name, message in (
        ("old.json", "of format 3, got format 0"),
        ("none.json", "got format list"),
        ("not-there.json", "expected a result of python -m benchmarks"),
    ):
        with pytest.raises(ValueError, match=message):
            results.load(tmp_path / name)


def test_what_is_broken_is_worse_and_what_was_not_asked_for_is_left_out():
    before = rows_of_a_run()
    now = [row for row in before if row.get("contender") != "fastguide"]
    now.append(ok(targets._SMALL, "fastguide", 1.0) | {"status": "failed", "reason": "kernel broke"})
    found = {row["contender"]: row for row in results.compared(now, before) if row["workload"] == targets._SMALL}
    assert (found["fastguide"]["status"], found["fastguide"]["reason"]) == ("worse", "kernel broke")
    assert "kernel broke" in pages.terminal(list(found.values()), colour=False)
    without = [row for row in before if row.get("contender") != "diffusers"]
    assert {row["status"] for row in results.compared(without, before)} == {"not compared"}
    assert results.compared([], before) == []
    now, path = machine.machine(CPU), Path("a.json")

    def check(machine, device="cpu", suites=("steps",)):
        return results.check_comparable({"machine": machine, "rows": before}, path, torch.device(device), suites)

    assert check(now) == []
    (difference,) = check(now | {"processor": "abacus"})
    assert difference.startswith("processor was 'abacus', and is ")
    with pytest.raises(ValueError, match=r"--compare: expected a run on cuda, as this one, got a\.json of cpu"):
        check(now, "cuda")
    with pytest.raises(ValueError, match=r"expected some of steps, solvers, .*, accuracy in .* got growth"):
        check(now, suites=["growth"])


def test_a_disturbed_run_says_so():
    copy = ok("w", "copy_ of the same bytes", 1e-5)
    assert results.disturbed([copy, copy | {"p10": 1e-5, "p90": 2e-5}], 0.05) == []
    (row,) = results.disturbed([copy, copy | {"p10": 1e-5, "p90": 8e-3}], None)
    assert row["reason"].startswith("copy_ took 10 to 8000 us: the machine was busy")
    other = copy | {"workload": "another", "seconds": 1.4e-5, "p90": 1.4e-5}
    assert results.disturbed([copy, other], None) == []  # some microseconds more or less
    copy, other = copy | {"bytes": 2e7}, other | {"bytes": 2e7}
    assert results.disturbed([copy, other | {"bytes": 3e7}], None) == []
    (row,) = results.disturbed([copy, other], None)
    assert (row["workload"], row["status"]) == ("another", "disturbed")
    assert "took 14 us, and 10 us for as many bytes" in row["reason"]
    assert pages._RED in pages.terminal([row], colour=True)


def test_a_busy_machine_meets_no_target_and_changes_no_ratio():
    """What was missed stays missed, and what is wrong stays worse."""
    (busy,) = results.disturbed([], 0.6)
    target = {"suite": "targets", "target": "t", "expected": ">= 1", "measured": 2.0}
    compared = {"suite": "compared", "workload": "w", "contender": "fastguide"}
    rows = [
        target | {"status": "met"},
        target | {"status": "missed", "reason": "why"},
        *(compared | {"then": 1.0, "now": 2.0, "status": status} for status in ("worse", "better", "alike")),
        compared | {"status": "worse", "reason": "wrong now"},
    ]
    statuses = [row["status"] for row in rows]
    assert results.doubted(rows, []) == rows
    then = results.doubted(rows, [busy])
    assert [row["status"] for row in then] == [*statuses[:2], "unsure", "unsure", *statuses[4:]]
    now = results.doubted([*rows, busy], [])
    assert [row["status"] for row in now[:-1]] == ["unsure", "missed", "unsure", "unsure", "alike", "worse"]
    assert "unsure" in pages.terminal(now, colour=False)


def test_other_processes_that_are_always_busy_are_reported(monkeypatch):
    ticks = iter([(1000, 600), (1100, 640), (7, 7), (7, 7), None, None])
    monkeypatch.setattr(machine, "ticks", lambda: next(ticks))
    assert [machine.busy(0.0) for _ in range(3)] == [pytest.approx(0.6), None, None]
    (row,) = results.disturbed([], 0.6)
    assert row["reason"].startswith("others used 60% of the processors")
    assert pages._RED in pages.terminal([row], colour=True)


def test_the_share_of_others_is_what_the_system_counts():
    """A thread of this test takes the part of another process."""
    if machine.ticks() is None:
        pytest.skip("this system has no /proc/stat")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            hashlib.sha256(bytes(2**20))

    busy_thread = threading.Thread(target=work)
    busy_thread.start()
    try:
        share = machine.busy(0.5)
    finally:
        stop.set()
        busy_thread.join()
    assert share > 0.5 / os.cpu_count()
