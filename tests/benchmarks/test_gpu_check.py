"""The check of a GPU in stages: each command adds its own to the record, with stand-ins for what needs a GPU."""

from __future__ import annotations

import inspect
import json
import sys

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.measure import gpu, timing
from benchmarks.measure.gpu_backward import Backward
from fastguide.step.backends.registry import BACKENDS


@pytest.fixture
def stages(monkeypatch):
    """Stand-ins for the stages, which note what ran; ``failing`` are those that fail."""
    ran, failing = [], set()

    def stage(name, result):
        def function():
            ran.append(name)
            return result | {"exit": int(name in failing)}

        return function

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu": "a stand-in"})
    monkeypatch.setattr(gpu_check, "OURS", ())
    monkeypatch.setattr(gpu_check, "build", stage("build", {}))
    monkeypatch.setattr(gpu_check, "test", stage("tests", {}))
    monkeypatch.setattr(gpu_check, "loops", stage("loops", {}))
    monkeypatch.setattr(gpu_check, "sanitize", lambda: ran.append("sanitizers") or {"not run": "there is none"})
    monkeypatch.setattr(gpu_check, "measure", lambda write: ran.append("times") or write({"small": [], "large": []}))
    return ran, failing


def test_all_stages_are_run_in_order(stages, tmp_path):
    ran, _ = stages
    assert gpu_check.main(["--output", str(tmp_path / "gpu.json")]) == 0
    assert ran == list(gpu_check.STAGES)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["machines"] == [{"gpu": "a stand-in", "stages": list(gpu_check.STAGES)}]


def test_a_command_adds_its_stages_to_the_record(stages, tmp_path, capsys):
    ran, failing = stages
    output = tmp_path / "gpu.json"
    failing.add("tests")
    assert gpu_check.main(["--output", str(output), "--only", "tests", "--no-build"]) == 1
    assert "loops: not run" in capsys.readouterr().out
    failing.clear()
    assert gpu_check.main(["--output", str(output), "--only", "times", "sanitizers"]) == 1
    assert gpu_check.main(["--output", str(output), "--only", "loops"]) == 1
    assert json.loads(output.read_text())["failures"] == ["tests: exit 1"]
    assert gpu_check.main(["--output", str(output), "--only", "tests"]) == 0
    assert ran == ["tests", "times", "sanitizers", "loops", "tests"]
    first, *_ = json.loads(output.read_text())["machines"]
    assert first["stages"] == ["tests"]


def test_a_library_that_was_built_elsewhere_is_used_as_it_is(stages):
    ran, _ = stages
    assert gpu_check.main(["--no-build"]) == 0
    assert ran == list(gpu_check.STAGES[1:])


def test_a_command_ends_with_its_time(monkeypatch):
    monkeypatch.setattr(gpu_check.Deadline, "end", 0.0)
    result = gpu_check.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"])
    assert result["exit"] is None


def test_a_machine_without_a_gpu_is_told_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main([]) == 2
    assert "expected a GPU that torch sees" in capsys.readouterr().err


@pytest.mark.parametrize("noise", ["none", "portable"])
def test_a_loop_s_step_is_timed_from_the_start(noise):
    """On the CPU: the same calls as on a GPU."""
    step = gpu.GpuStep((1, 4, 8, 8), torch.float32, torch.bfloat16, noise, cursor=True, device="cpu")
    call = step.fastguide("reference")

    def timed(count):
        def measure(call):
            for _ in range(count):
                call()
            return 1.0

        return step.from_the_start(measure)(call)

    for _ in range(2):
        assert timed(20) == 1.0
        assert int(step.cursor.state[0, 0]) == 20
    with pytest.raises(RuntimeError, match="the loop was finished"):
        timed(gpu.CURSOR_STEPS)


@pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")
@pytest.mark.parametrize(("clip", "learns", "tensors"), [(None, False, 4), (None, True, 6), (1.0, True, 7)])
def test_a_backward_pass_is_timed_that_fills_all_gradients(clip, learns, tensors):
    """On the CPU: the same calls as on a GPU."""
    back = Backward((2, 4, 8, 8), torch.float32, torch.float32, clip, learns, device="cpu")
    for grad in (back.of_sample, *back.of_predictions, *([] if back.of_weights is None else [back.of_weights])):
        grad.fill_(torch.nan)
    back.by("native")()
    assert bool(torch.stack([back.of_sample, *back.of_predictions]).isfinite().all())
    assert back.of_weights is None or bool(back.of_weights.isfinite().all())
    assert back.bytes == tensors * back.came.nbytes


def test_a_loop_is_long_enough_for_what_is_timed():
    replays = inspect.signature(timing.in_a_graph).parameters["replays"].default
    host_calls = inspect.signature(gpu.host_microseconds).parameters["calls"].default
    assert timing._WARM_UPS + replays * gpu.SMALL_REPEATS < gpu.CURSOR_STEPS
    assert host_calls < gpu.CURSOR_STEPS


def test_what_misses_its_target_is_named():
    """Large steps are judged by the share of a copy's bandwidth if their state is float32."""
    large = {"name": "large", "noise": "none", "state": "float32", "share_of_copy": {"native": 0.91}, "errors": {}}
    large["microseconds"] = {"native": 100.0, "torch.compile": 90.0}
    small = {"name": "small", "gpu_microseconds": {"triton": 3.1}, "host_microseconds": {"triton": 9.0}}
    cursor = {"name": "cursor", "gpu_microseconds": {"triton": 2.4}, "host_microseconds": {"triton": 21.0}}
    assert gpu_check.misses({"large": [large], "small": [small], "cursor": [cursor]}) == [
        "large: native reaches 91.0% of the copy's bandwidth, expected 92%",
        "large: native takes 100.00 us, torch.compile 90.00 us",
        "small: triton gpu 3.1 us, expected 3.0",
        "cursor: triton host 21.0 us, expected 20.0",
    ]
    back = {"name": "backward", "state": "float32", "share_of_copy": {"triton": 0.8}, "microseconds": {}, "errors": {}}
    assert gpu_check.misses({"backward": [back]}) == [
        "backward: triton reaches 80.0% of the copy's bandwidth, expected 85%"
    ]
    noisy = large | {"noise": "portable", "microseconds": {}}
    assert gpu_check.misses({"large": [noisy | {"share_of_copy": {"native": 0.86}}]}) == []
    assert len(gpu_check.misses({"large": [noisy | {"share_of_copy": {"native": 0.84}}]})) == 1
    assert gpu_check.misses({"large": [noisy | {"share_of_copy": {"native": 0.5}, "state": "bfloat16"}]}) == []
