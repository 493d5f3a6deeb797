"""Test the command ``python -m benchmarks``: a whole run, its exit status, and the options that it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import workloads
from benchmarks.contenders import registry
from benchmarks.measure import accuracy, steps
from benchmarks.report import machine, pages, results, targets
from benchmarks.workloads import Workload
from tests.support.bench_rows import of_bfloat16

CPU = torch.device("cpu")
SMALL = Workload("tiny", (2, 3, 8, 8))


@pytest.fixture
def idle(monkeypatch):
    """Let a run find the machine idle, whatever else uses it."""
    monkeypatch.setattr(machine, "busy", lambda: 0.0)
    monkeypatch.setattr(results, "_STEADY", 1e9)


def test_the_command(idle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workloads, "quick", lambda: [SMALL])
    monkeypatch.setattr(steps, "CONTENDERS", {"fastguide": registry.fastguide, "torch eager": registry.torch_eager})
    monkeypatch.chdir(tmp_path)
    arguments = ["--device", "cpu", "--only", "steps", "--json", "one.json"]
    assert command.main(arguments) == 0
    assert json.loads(Path("one.json").read_text())["machine"]["device"] == "cpu"
    assert Path("fastguide-bench/index.html").exists()
    assert "tiny, ddim, classifier-free, (2, 3, 8, 8), float32" in capsys.readouterr().out
    monkeypatch.setattr(results, "_WORSE", 1e9)
    assert command.main([*arguments, "--compare", "one.json"]) == 0
    assert "of the baseline in the same run" in capsys.readouterr().out
    monkeypatch.setattr(results, "_WORSE", 0.0)
    assert command.main([*arguments, "--compare", "one.json"]) == 1


def test_what_fails_is_not_hidden(idle, monkeypatch, tmp_path, capsys):
    """Its row, a target and the exit status show it."""
    monkeypatch.setattr(workloads, "quick", lambda: [SMALL])
    monkeypatch.setattr(targets, "_SMALL", SMALL.title)
    monkeypatch.chdir(tmp_path)

    def broken(inputs):
        raise RuntimeError

    for name, status in (("fastguide", "failed"), ("torch.compile", "not run")):
        monkeypatch.setattr(steps, "CONTENDERS", {"torch eager": registry.torch_eager, name: broken})
        assert command.main(["--only", "steps", "--json", "a.json"]) == (1 if status == "failed" else 0)
        rows = json.loads(Path("a.json").read_text())["rows"]
        assert {r["contender"]: r["status"] for r in rows if r["suite"] == "steps"}[name] == status
        missed = [r["target"] for r in rows if r["suite"] == "targets" and r["status"] == "missed"]
        assert [target.partition(",")[0] for target in missed] == (
            ["a step into a new output"] if status == "failed" else []
        )
        assert status in capsys.readouterr().out


def test_a_suite_that_raises_keeps_its_rows(idle, monkeypatch, tmp_path):
    def broken(device):
        yield of_bfloat16("fastguide", 1.0)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(accuracy, "measure", broken)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--only", "accuracy", "--json", "a.json"]) == 1
    found = json.loads(Path("a.json").read_text())["rows"]
    assert [row["status"] for row in found if row["suite"] in ("accuracy", "the suite")] == ["ok", "failed"]
    assert "out of memory" in pages.terminal(found, colour=False)


def test_an_interrupted_run_keeps_what_it_has(idle, monkeypatch, tmp_path):
    def interrupted(device):
        yield of_bfloat16("fastguide", torch.nan)
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "measure", interrupted)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--only", "accuracy", "--json", "a.json"]) == 130
    found = json.loads(Path("a.json").read_text())
    assert found["interrupted"]
    assert found["rows"][0]["error"] is None  # JSON has no NaN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "steps", "speed"], "--only: expected some of steps, solvers, moments, .*, got 'speed'"),
        (["--only", "steps", "--workload", "nothing"], "--workload: expected the beginning of one of"),
        (
            ["--only", "loops", "--workload", "nothing"],
            "--workload: expected .* of\n  policy, 20 steps",
        ),
        (
            ["--only", "accuracy", "--workload", "SD"],
            "--workload: expected none, as accuracy has no workloads, got 'SD'",
        ),
        (["--compare", "nowhere.json"], "--compare: nowhere.json: expected a result of python -m benchmarks"),
        (["--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["--device", "abacus"], "--device: expected one that torch sees, got 'abacus'"),
        (["--output", "/proc/nowhere"], "--output: expected a folder that can be written"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys):
    assert command.main(["--device", "cpu", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_gpu_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert command.main(["--device", "cuda"]) == 2
    assert "--device: expected one that torch sees, got 'cuda'" in capsys.readouterr().err
