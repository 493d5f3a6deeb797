"""Test the suites: a contender that is wrong is not timed, and one that raises costs only its own row."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks import suites, workloads
from benchmarks.contenders import correctness, registry
from benchmarks.measure import accuracy, guidance, loops, pipelines, solvers, steps, timing
from benchmarks.report import pages
from benchmarks.workloads import Inputs, Workload

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
    """A contender that does not have a workload says why."""
    pytest.importorskip("diffusers")
    inputs = Inputs(workload, CPU)
    served = []
    for name, make in registry.CONTENDERS.items():
        if name.startswith("torch.compile"):
            continue
        try:
            with torch.no_grad():
                error = correctness.relative_error(inputs, name, make(inputs)())
        except workloads.NotRunError:
            continue
        assert error < correctness.tolerance(inputs, name), name
        served.append(name)
    assert {"fastguide", "fastguide out=", "torch eager", "diffusers"} <= set(served)
    other_gradient = (workload.solver == "ddim", workload.form) in ((True, "mean"), (False, "epsilon"))
    assert ("guided-diffusion" in served) is not other_gradient
    assert inputs.sample.dtype == workload.state
    count = workload.count + (workload.form is not None) + workload.solver.endswith("learned")
    assert inputs.bytes == 2 * inputs.sample.nbytes + count * inputs.sample.numel() * workload.dtype.itemsize


def test_what_is_wrong_is_not_timed(monkeypatch):
    wrong = {"fastguide": lambda i: lambda: 1.01 * registry.fastguide(i)(), "torch eager": registry.torch_eager}
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
    assert "wrong" in pages.terminal(list(rows.values()), colour=False)
    assert pages._RED in pages.terminal(list(rows.values()), colour=True)


def test_a_contender_that_raises_late_costs_its_own_row_only(monkeypatch):
    """It raises after the check and the warm-ups, in a timed call; the clock goes on by its readings alone."""
    calls, readings = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings) * 1e-3)

    def fails_later(inputs):
        call = registry.fastguide(inputs)

        def called():
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("tired")
            return call()

        return called

    monkeypatch.setattr(steps, "CONTENDERS", {"fastguide": fails_later, "torch eager": registry.torch_eager})
    rows = {row["contender"]: row for row in steps.measure(SMALL, CPU, 0.05)}
    assert (rows["fastguide"]["status"], rows["fastguide"]["reason"]) == ("failed", "RuntimeError: tired")
    assert rows["torch eager"]["status"] == "ok"


def test_what_is_compiled_computes_the_same():
    pytest.importorskip("torch._inductor")
    workload = Workload("tiny", (2, 3, 8, 8), "ddpm learned", "mean gradient", torch.bfloat16)
    inputs = Inputs(workload, CPU)
    for name in ("torch.compile", "torch.compile out="):
        with torch.no_grad():
            got = registry.CONTENDERS[name](inputs)()
        assert correctness.relative_error(inputs, name, got) < correctness.tolerance(inputs, name)


def test_lines_through_points():
    slope, intercept, explained = steps.line([(1, 5.0), (2, 7.0), (4, 11.0)])
    assert (slope, intercept, explained) == pytest.approx((2.0, 3.0, 1.0))
    assert steps.line([(1, 1.0), (2, 4.0), (3, 9.0), (4, 16.0)])[2] < 0.99
    assert steps.steeper([(n, 5.0 + 2 * n) for n in (1, 2, 4, 8, 16)]) == pytest.approx(1.0)
    assert steps.steeper([(n, 5.0 + n * n) for n in (1, 2, 4, 8, 16)]) == pytest.approx(4.0)


def test_peak_memory_counts_what_lives_at_once():
    with guidance.PeakMemory() as memory:
        for _ in range(3):
            x = torch.ones(256)
            y = x + 1
            del x, y
    assert memory.peak == 2 * 1024
    assert memory._now == 0
    layer, row = torch.nn.Linear(256, 256), torch.ones(1, 256)
    with guidance.PeakMemory() as memory, torch.no_grad():
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
    randn_tensor, x = scheduling.randn_tensor, torch.randn(accuracy.SHAPE)
    step = accuracy._diffusers("ddpm", CPU)
    given = step(3, x, x, x, torch.ones_like(x)) - step(3, x, x, x, torch.zeros_like(x))
    assert given.std() < 1e-5 < given.mean()
    with pytest.raises(RuntimeError):
        step(3, x, x[..., :3], x[..., :3], x)
    assert scheduling.randn_tensor is randn_tensor


@pytest.mark.parametrize("kind", ["policy", "small DiT"])
def test_loops_agree_with_diffusers_before_they_are_timed(kind):
    pytest.importorskip("diffusers")
    rows = list(loops.measure(kind, 2, CPU, 0.01))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert {row["contender"] for row in rows} >= {"diffusers", "Sampler, eager"}


@pytest.mark.parametrize("name", ["Euler", "Heun", "DPM++ 2M", "UniPC 2, flow", "LMS 4", "PNDM"])
def test_solvers_agree_with_diffusers_before_they_are_timed(name, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(solvers, "SHAPES", {"SD 512": (2, 3, 8, 8), "pixels": (2, 3, 9, 9)})
    small, large = solvers.small_title(name), solvers.large_title(name)
    assert suites.chosen_solvers([small]) == [small]
    rows = list(solvers.measure(small, CPU, 0.01))
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert {row["contender"] for row in rows} == {
        *("diffusers", "fastguide", "diffusers, of the doubled output", "fastguide's scheduler"),
        *("diffusers, of the doubled output, with set_timesteps", "fastguide's scheduler, with set_timesteps"),
    }
    rows = list(solvers.measure(large, CPU, 0.01))
    assert {row["contender"] for row in rows} == {"fastguide out=", "copy_ of the same bytes"}
    assert {row["bytes"] for row in rows} == {2 * 3 * 81 * solvers.moved_bytes(solvers.SOLVERS[name].table(), 15)}


def test_what_a_call_with_a_history_moves():
    """As counted by hand: the sample, two predictions and the output, each slot that is read, and one written."""
    tensors = {"Euler": 4, "Heun": 5, "DPM++ 2M": 6, "DPM++ 3M": 7, "UniPC 2": 7, "PNDM": 8, "LMS 4": 8}
    for name, count in tensors.items():
        assert solvers.moved_bytes(solvers.SOLVERS[name].table(), 15) == 4 * count


def test_a_solver_with_noise_compares_the_schedulers_alone(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(solvers, "SHAPES", {"SD 512": (2, 3, 8, 8), "pixels": (2, 3, 9, 9)})
    rows = list(solvers.measure(solvers.small_title("SA-Solver"), CPU, 0.01))
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert solvers.large_title("SA-Solver") not in solvers.titles()


@pytest.mark.parametrize("scheduler", pipelines.SCHEDULERS)
@pytest.mark.parametrize("guidance", pipelines.RESCALE)
def test_pipelines_agree_with_diffusers_before_they_are_timed(guidance, scheduler):
    pytest.importorskip("diffusers")
    rows = list(pipelines.measure(scheduler, guidance, (2, 3, 8, 8), CPU, 0.01))
    by_hand = [] if guidance == "rescaled" else ["fastguide, step(guidance_scale=)"]
    assert {row["contender"]: row["status"] for row in rows} == dict.fromkeys(
        ["diffusers", "fastguide, accelerate(pipe)", *by_hand], "ok"
    )
    assert {row["workload"] for row in rows} == {f"pipeline, 50 {scheduler} steps, {guidance}, (2, 3, 8, 8)"}


def test_pipelines_are_chosen_by_their_titles():
    assert len(suites.chosen_pipelines([])) == 8
    assert suites.chosen_pipelines(["pipeline, 50 DDIM steps, rescaled, (1,"]) == [("DDIM", "rescaled", (1, 4, 64, 64))]


def test_without_what_is_optional_the_rest_runs(monkeypatch, tmp_path):
    """Without diffusers and matplotlib, the rows and the page say so."""
    import builtins

    real = builtins.__import__

    def no_such(name, *arguments, **keywords):
        if name.partition(".")[0] in ("diffusers", "matplotlib") and not name.startswith("fastguide"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_such)
    monkeypatch.setattr(steps, "CONTENDERS", {"fastguide": registry.fastguide, "diffusers": registry.diffusers})
    rows = list(steps.measure(SMALL, CPU, 0.01))
    assert {r["contender"]: r["status"] for r in rows}["diffusers"] == "not run"
    assert [r["reason"] for r in loops.measure("policy", 2, CPU, 0.01)] == ["diffusers is not installed"]
    assert [r["reason"] for r in pipelines.measure("DDIM", "rescaled", (1, 3, 8, 8), CPU, 0.01)] == [
        "diffusers is not installed"
    ]
    written = pages.write({"machine": {}, "rows": rows}, tmp_path)
    assert "no plots: matplotlib is not installed" in written[0].read_text()


def test_workloads_have_names_of_their_own():
    for made in (workloads.quick(), workloads.full()):
        assert len({w.title for w in made}) == len(made)
    for workload in workloads.full():
        small = dataclasses.replace(workload, shape=(1, 4, 8, 8))
        with torch.no_grad():
            assert registry.fastguide(Inputs(small, CPU))().isfinite().all()
    (chosen,) = suites.chosen_steps(["SDXL, add"], False, False)
    assert chosen.title == "SDXL, add_noise, (1, 4, 128, 128), float32"
    assert [w.title for w in suites.chosen_steps(["pixels, batch"], False, False)] == []
    assert all(Inputs(w, torch.device("meta")).bytes > 256e6 for w in workloads.large()[:1])
    assert suites.chosen_loops(["policy, 5"], False) == [("policy", 50)]
