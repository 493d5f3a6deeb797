"""The benchmark suite: what is wrong is not timed, a miss is not hidden, and results are compared by their ratios."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import run, workloads
from benchmarks.contenders import registry as contenders
from benchmarks.measure import accuracy, loops, steps
from benchmarks.measure import guidance as methods
from benchmarks.report import pages as report
from benchmarks.report import results, targets
from benchmarks.workloads import Inputs, Workload
from fastguide import __main__ as cli
from tests.support.bench_rows import of_bfloat16, ok, rows_of_a_run

CPU = torch.device("cpu")
SMALL = Workload("tiny", (2, 3, 8, 8))
EVERY = [
    Workload("tiny", (2, 3, 8, 8), solver, guidance, dtype, state)
    for solver in workloads.SOLVERS
    for guidance in workloads.GUIDANCES
    for dtype, state in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2)
    if (solver != "add_noise" or guidance == "none") and (solver, guidance) != ("ddim", "mean gradient")
]


@pytest.mark.parametrize("workload", EVERY, ids=lambda w: w.title)
def test_every_contender_computes_the_same(workload):
    """Or says why it does not serve a workload."""
    pytest.importorskip("diffusers")
    inputs = Inputs(workload, CPU)
    served = []
    for name, make in contenders.CONTENDERS.items():
        if name.startswith("torch.compile"):
            continue
        try:
            with torch.no_grad():
                error = contenders.relative_error(inputs, name, make(inputs)())
        except workloads.NotRunError:
            continue
        assert error < contenders.tolerance(inputs, name), name
        served.append(name)
    assert {"fastguide", "fastguide out=", "torch eager", "diffusers"} <= set(served)
    by_gradient_elsewhere = (workload.solver == "ddim", workload.form) in ((True, "mean"), (False, "epsilon"))
    assert ("guided-diffusion" in served) is not by_gradient_elsewhere
    assert inputs.sample.dtype == workload.state
    count = workload.count + (workload.form is not None) + workload.solver.endswith("learned")
    assert inputs.bytes == 2 * inputs.sample.nbytes + count * inputs.sample.numel() * workload.dtype.itemsize


def test_what_is_wrong_is_not_timed(monkeypatch):
    wrong = {"fastguide": lambda i: lambda: 1.01 * contenders.fastguide(i)(), "torch eager": contenders.torch_eager}
    broken = {"diffusers": lambda i: 1 / 0}
    monkeypatch.setattr(steps, "CONTENDERS", wrong | broken)
    rows = {row["contender"]: row for row in steps.measure(SMALL, CPU, 0.01)}
    assert list(rows)[:2] == ["fastguide", "diffusers"]
    assert rows["fastguide"]["status"] == "wrong"
    assert "seconds" not in rows["fastguide"]
    assert rows["diffusers"] | {"status": "not run"} == rows["diffusers"]
    assert rows["diffusers"]["reason"] == "ZeroDivisionError: division by zero"
    assert rows["diffusers"]["raised"]
    assert rows["torch eager"]["status"] == "ok"
    assert rows["torch eager"]["share_of_copy"] == pytest.approx(
        rows["copy_ of the same bytes"]["seconds"] / rows["torch eager"]["seconds"]
    )
    assert "wrong" in report.terminal(list(rows.values()), colour=False)
    assert report._RED in report.terminal(list(rows.values()), colour=True)


def test_what_raises_late_costs_its_own_row_alone(monkeypatch, tmp_path):
    calls = []

    def tires(inputs):
        call = contenders.fastguide(inputs)

        def called():
            calls.append(1)
            if len(calls) > 20:
                raise RuntimeError("tired")
            return call()

        return called

    monkeypatch.setattr(steps, "CONTENDERS", {"fastguide": tires, "torch eager": contenders.torch_eager})
    rows = {row["contender"]: row for row in steps.measure(SMALL, CPU, 0.05)}
    assert (rows["fastguide"]["status"], rows["fastguide"]["reason"]) == ("failed", "RuntimeError: tired")
    assert rows["torch eager"]["status"] == "ok"

    def broken(device):
        yield of_bfloat16("fastguide", 1.0)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(accuracy, "measure", broken)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--only", "accuracy", "--json", "a.json"]) == 1
    found = json.loads(Path("a.json").read_text())["rows"]
    assert [row["status"] for row in found if row["suite"] in ("accuracy", "the suite")] == ["ok", "failed"]
    assert "out of memory" in report.terminal(found, colour=False)


def test_what_is_compiled_computes_the_same():
    pytest.importorskip("torch._inductor")
    workload = Workload("tiny", (2, 3, 8, 8), "ddpm learned", "mean gradient", torch.bfloat16)
    inputs = Inputs(workload, CPU)
    for name in ("torch.compile", "torch.compile out="):
        with torch.no_grad():
            got = contenders.CONTENDERS[name](inputs)()
        assert contenders.relative_error(inputs, name, got) < contenders.tolerance(inputs, name)


def test_a_page_holds_everything(tmp_path):
    rows = rows_of_a_run(2.0)
    rows += targets.judged(rows, "cpu")
    found = {"machine": {"torch": "<2>"}, "rows": rows}
    written = report.write(found, tmp_path)
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
    method = {"suite": "methods", "status": "ok", "method": "classifier"}
    rows = [
        *rows_of_a_run(),
        *(ok(f"policy, {n} steps", "diffusers", 1.0, "loops") for n in (20, 50)),
        {"suite": "growth", "status": "ok", "against": "batch", **line},
        method | {"what": "cost", "parameters": 10, "seconds_per_image_step": 1e-6, "peak_bytes_per_image": 1024},
        method | {"what": "quality", "scale": 1.0, "agreement": 0.9, "diversity": 1.0, "seconds_per_image": 1e-3},
    ]
    written = report.write({"machine": {}, "rows": rows}, tmp_path)
    names = ["speed-up", "roofline", "error-against-speed", "loops", "growth", "methods"]
    assert [path.stem for path in written[1:]] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def test_what_was_not_run_is_one_line_for_each_reason():
    missing = {"suite": "steps", "workload": "w", "status": "not run"}
    rows = [ok("w", "diffusers", 1.0)] + [missing | {"contender": c, "reason": "why"} for c in ("a", "b")]
    (table,) = report.tables([*rows, missing | {"contender": "c", "reason": "else"}])
    assert [cells[0] for _, cells in table.body] == ["diffusers"]
    assert table.notes == ["not run: a, b: why", "not run: c: else"]
    alone = [missing | {"contender": "a", "reason": "why"}]
    for text in (report.terminal(alone, colour=False), report.markdown(alone)):
        assert "not run: a: why" in text


def test_two_runs_are_compared_by_ratios_within_each():
    """A machine of half the speed is no regression; a contender that lost ground is."""
    slow = [row | {"seconds": 2 * row["seconds"]} if "seconds" in row else row for row in rows_of_a_run()]
    alike = results.compared(slow, rows_of_a_run())
    assert {row["status"] for row in alike} == {"alike"}
    assert {row["contender"] for row in alike} == {"fastguide", "fastguide out=", "fastguide's scheduler"}
    steps_alone = [row for row in rows_of_a_run() if row["suite"] != "accuracy"]
    worse = {row["contender"]: row["status"] for row in results.compared(rows_of_a_run(2.0), steps_alone)}
    assert worse == {"fastguide": "worse", "fastguide out=": "alike", "fastguide's scheduler": "alike"}
    less_exact = [*steps_alone, of_bfloat16("fastguide", 1.5), of_bfloat16("diffusers", 6.0)]
    (row,) = [r for r in results.compared(less_exact, rows_of_a_run()) if r["status"] == "worse"]
    assert (row["workload"], row["now"]) == ("error of 50 ddim steps, bfloat16", 0.25)
    better = results.compared(rows_of_a_run(), rows_of_a_run(2.0))
    assert {row["status"] for row in better} == {"better", "alike"}


def test_results_are_read_as_they_were_written(tmp_path):
    found = {"machine": results.machine(CPU), "rows": rows_of_a_run()}
    results.save(found, tmp_path / "deep" / "a.json")
    assert results.load(tmp_path / "deep" / "a.json")["rows"] == found["rows"]
    (tmp_path / "old.json").write_text(json.dumps({"format": 0, "rows": []}))
    (tmp_path / "none.json").write_text("[]")
    for name, message in (
        ("old.json", "of format 3, got format 0"),
        ("none.json", "got format list"),
        ("not-there.json", "expected a result of fastguide bench"),
    ):
        with pytest.raises(ValueError, match=message):
            results.load(tmp_path / name)


def test_what_is_broken_is_worse_and_what_was_not_asked_for_is_left_out():
    before = rows_of_a_run()
    now = [row for row in before if row.get("contender") != "fastguide"]
    now.append(ok(targets._SMALL, "fastguide", 1.0) | {"status": "failed", "reason": "kernel broke"})
    found = {row["contender"]: row for row in results.compared(now, before) if row["workload"] == targets._SMALL}
    assert (found["fastguide"]["status"], found["fastguide"]["reason"]) == ("worse", "kernel broke")
    assert "kernel broke" in report.terminal(list(found.values()), colour=False)
    without = [row for row in before if row.get("contender") != "diffusers"]
    assert {row["status"] for row in results.compared(without, before)} == {"not compared"}
    assert results.compared([], before) == []
    here, path = results.machine(CPU), Path("a.json")

    def check(machine, device="cpu", suites=("steps",)):
        return results.check_comparable({"machine": machine, "rows": before}, path, torch.device(device), suites)

    assert check(here) == []
    (said,) = check(here | {"processor": "abacus"})
    assert said.startswith("processor was 'abacus', and is ")
    with pytest.raises(ValueError, match=r"--compare: expected a run on cuda, as this one, got a\.json of cpu"):
        check(here, "cuda")
    with pytest.raises(ValueError, match=r"expected some of steps, loops, accuracy in this run .* got growth"):
        check(here, suites=["growth"])


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
    assert "took 14 us here, of as many bytes elsewhere 10" in row["reason"]
    assert report._RED in report.terminal([row], colour=True)


def test_a_busy_machine_meets_no_target_and_changes_no_ratio():
    """But what was missed, and what is wrong, stays so."""
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
    assert "unsure" in report.terminal(now, colour=False)


def test_neighbours_that_are_always_there_are_said(monkeypatch):
    ticks = iter([(1000, 600), (1100, 640), (7, 7), (7, 7), None, None])
    monkeypatch.setattr(results, "_ticks", lambda: next(ticks))
    assert [results.busy(0.0) for _ in range(3)] == [pytest.approx(0.6), None, None]
    (row,) = results.disturbed([], 0.6)
    assert row["reason"].startswith("others used 60% of the processors")
    assert report._RED in report.terminal([row], colour=True)


def test_the_share_of_others_is_what_the_system_counts():
    """An own loop in the place of a neighbour."""
    if results._ticks() is None:
        pytest.skip("this system has no /proc/stat")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            hashlib.sha256(bytes(2**20))

    neighbour = threading.Thread(target=work)
    neighbour.start()
    try:
        share = results.busy(0.5)
    finally:
        stop.set()
        neighbour.join()
    assert share > 0.5 / os.cpu_count()


def test_what_fails_is_not_hidden(monkeypatch, tmp_path, capsys):
    """Neither by its row, nor by a target, nor by the exit status."""
    monkeypatch.setattr(workloads, "quick", lambda: [SMALL])
    monkeypatch.setattr(targets, "_SMALL", SMALL.title)
    monkeypatch.chdir(tmp_path)

    def broken(inputs):
        raise RuntimeError

    for name, status in (("fastguide", "failed"), ("torch.compile", "not run")):
        monkeypatch.setattr(steps, "CONTENDERS", {"torch eager": contenders.torch_eager, name: broken})
        assert cli.main(["bench", "--only", "steps", "--json", "a.json"]) == (1 if status == "failed" else 0)
        rows = json.loads(Path("a.json").read_text())["rows"]
        assert {r["contender"]: r["status"] for r in rows if r["suite"] == "steps"}[name] == status
        missed = [r["target"] for r in rows if r["suite"] == "targets" and r["status"] == "missed"]
        assert [target.partition(",")[0] for target in missed] == (
            ["a step into a new output"] if status == "failed" else []
        )
        assert status in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    def interrupted(device):
        yield of_bfloat16("fastguide", torch.nan)
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "measure", interrupted)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--only", "accuracy", "--json", "a.json"]) == 130
    found = json.loads(Path("a.json").read_text())
    assert found["interrupted"]
    assert found["rows"][0]["error"] is None  # JSON has no NaN


def test_lines_through_points():
    slope, intercept, explained = steps.line([(1, 5.0), (2, 7.0), (4, 11.0)])
    assert (slope, intercept, explained) == pytest.approx((2.0, 3.0, 1.0))
    assert steps.line([(1, 1.0), (2, 4.0), (3, 9.0), (4, 16.0)])[2] < 0.99
    assert steps.steeper([(n, 5.0 + 2 * n) for n in (1, 2, 4, 8, 16)]) == pytest.approx(1.0)
    assert steps.steeper([(n, 5.0 + n * n) for n in (1, 2, 4, 8, 16)]) == pytest.approx(4.0)


def test_peak_memory_counts_what_lives_at_once():
    with methods.PeakMemory() as memory:
        for _ in range(3):
            x = torch.ones(256)
            y = x + 1
            del x, y
    assert memory.peak == 2 * 1024
    assert memory._now == 0
    layer, row = torch.nn.Linear(256, 256), torch.ones(1, 256)
    with methods.PeakMemory() as memory, torch.no_grad():
        layer(row)
    assert memory.peak == 1024  # and not its weights


def test_accuracy_knows_what_is_nearer():
    pytest.importorskip("diffusers")
    rows = {(r["solver"], r["dtype"], r["contender"]): r["error"] for r in accuracy.measure(CPU, 0.01)}
    assert len(rows) == 24
    for solver in ("ddim", "ddpm"):
        for contender in accuracy.CONTENDERS:
            assert rows[solver, "float32", contender] < 1e-5
        for dtype in ("bfloat16", "float16"):
            for contender in ("fastguide", "torch eager", "guided-diffusion"):
                assert rows[solver, dtype, contender] < 0.6 * rows[solver, dtype, "diffusers"]


def test_accuracy_leaves_diffusers_noise_as_it_was():
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    drawn, x = scheduling.randn_tensor, torch.randn(accuracy.SHAPE)
    step = accuracy._diffusers("ddpm", CPU)
    given = step(3, x, x, x, torch.ones_like(x)) - step(3, x, x, x, torch.zeros_like(x))
    assert given.std() < 1e-5 < given.mean()
    with pytest.raises(RuntimeError):
        step(3, x, x[..., :3], x[..., :3], x)
    assert scheduling.randn_tensor is drawn


@pytest.mark.parametrize("kind", ["policy", "small DiT"])
def test_loops_agree_with_diffusers_before_they_are_timed(kind):
    pytest.importorskip("diffusers")
    rows = list(loops.measure(kind, 2, CPU, 0.01))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert {row["contender"] for row in rows} >= {"diffusers", "Sampler, eager"}


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workloads, "quick", lambda: [SMALL])
    monkeypatch.setattr(steps, "CONTENDERS", {"fastguide": contenders.fastguide, "torch eager": contenders.torch_eager})
    monkeypatch.setattr(results, "busy", lambda: 0.0)  # whatever else this machine does
    monkeypatch.setattr(results, "_STEADY", 1e9)
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "--device", "cpu", "--only", "steps", "--json", "one.json"]
    assert cli.main(arguments) == 0
    assert json.loads(Path("one.json").read_text())["machine"]["device"] == "cpu"
    assert Path("fastguide-bench/index.html").exists()
    assert "tiny, ddim, classifier-free, (2, 3, 8, 8), float32" in capsys.readouterr().out
    monkeypatch.setattr(results, "_WORSE", 1e9)
    assert cli.main([*arguments, "--compare", "one.json"]) == 0
    assert "then and now" in capsys.readouterr().out
    monkeypatch.setattr(results, "_WORSE", 0.0)
    assert cli.main([*arguments, "--compare", "one.json"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "steps", "speed"], "--only: expected some of steps, loops, .*, got 'speed'"),
        (["--only", "steps", "--workload", "nothing"], "--workload: expected the beginning of one of"),
        (
            ["--only", "loops", "--workload", "nothing"],
            "--workload: expected .* of\n  policy, 20 steps",
        ),
        (
            ["--only", "accuracy", "--workload", "SD"],
            "--workload: expected none, as accuracy has none of these, got 'SD'",
        ),
        (["--compare", "nowhere.json"], "--compare: nowhere.json: expected a result of fastguide bench"),
        (["--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["--device", "abacus"], "--device: expected one that torch sees, got 'abacus'"),
        (["--output", "/proc/nowhere"], "--output: expected a folder that can be written"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys):
    import re

    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_gpu_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device: expected one that torch sees, got 'cuda'" in capsys.readouterr().err


def test_without_what_is_optional_the_rest_runs(monkeypatch, tmp_path):
    """No diffusers, no matplotlib: rows say so, and the page too."""
    import builtins

    real = builtins.__import__

    def no_such(name, *arguments, **keywords):
        if name.partition(".")[0] in ("diffusers", "matplotlib") and not name.startswith("fastguide"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_such)
    monkeypatch.setattr(steps, "CONTENDERS", {"fastguide": contenders.fastguide, "diffusers": contenders.diffusers})
    rows = list(steps.measure(SMALL, CPU, 0.01))
    assert {r["contender"]: r["status"] for r in rows}["diffusers"] == "not run"
    assert [r["reason"] for r in loops.measure("policy", 2, CPU, 0.01)] == ["diffusers is not installed"]
    written = report.write({"machine": {}, "rows": rows}, tmp_path)
    assert "no plots: matplotlib is not installed" in written[0].read_text()


def test_workloads_have_names_of_their_own():
    for made in (workloads.quick(), workloads.full()):
        assert len({w.title for w in made}) == len(made)
    for workload in workloads.full():
        small = dataclasses.replace(workload, shape=(1, 4, 8, 8))
        with torch.no_grad():
            assert contenders.fastguide(Inputs(small, CPU))().isfinite().all()
    (chosen,) = run.chosen_steps(["SDXL, add"], False, False)
    assert chosen.title == "SDXL, add_noise, (1, 4, 128, 128), float32"
    assert [w.title for w in run.chosen_steps(["pixels, batch"], False, False)] == []
    assert all(Inputs(w, torch.device("meta")).bytes > 256e6 for w in workloads.large()[:1])
    assert run.chosen_loops(["policy, 5"], False) == [("policy", 50)]
