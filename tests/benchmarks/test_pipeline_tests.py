"""The command that runs diffusers' tests accelerated: what it compares, records, and calls broken."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.scheduler_pair import diffusers

compare = pytest.importorskip("benchmarks.pipeline_tests.compare")
calls = pytest.importorskip("benchmarks.pipeline_tests.calls")
findings = pytest.importorskip("benchmarks.pipeline_tests.findings")
runs = pytest.importorskip("benchmarks.pipeline_tests.runs")

SMALL_UNET = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
KINDS = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.5]), 0.125),
        ({"images": np.ones(3), "note": "a"}, {"images": np.ones(3), "note": "b"}, 0.0),
        ([torch.tensor([float("nan"), 2.0])], [torch.tensor([float("nan"), 2.0])], 0.0),
        (torch.tensor([float("nan"), 2.0]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.zeros(2), torch.ones(2), float("inf")),
        (torch.ones(2), torch.ones(3), float("inf")),
        (Image.new("L", (2, 2), 7), Image.new("L", (2, 2), 8), 0.0),
        (Image.new("L", (2, 2), 7), Image.new("L", (2, 2), 9), 1 / 255),
        (torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 1.5, dtype=torch.bfloat16), 0.5),
    ],
)
def test_outputs_differ_by_their_largest_difference(one, other, expected):
    assert compare.difference(one, other) == pytest.approx(expected)


def test_outputs_of_few_numbers_do_not_vary():
    assert compare.varies((torch.arange(3.0), "note"))
    assert not compare.varies({"images": torch.tensor([0.0, 1.0, 1.0, float("nan")])})


def test_a_copied_generator_draws_the_same_and_leaves_the_original():
    generator = torch.Generator().manual_seed(5)
    arguments = {"generator": [generator], "latents": torch.ones(2)}
    drawn = torch.randn(3, generator=compare.copied(arguments)["generator"][0])
    assert torch.equal(drawn, torch.randn(3, generator=generator))
    compare.copied(arguments)["latents"].zero_()
    assert arguments["latents"].sum() == 2


def watched(kind, **given):
    """Return a small pipeline of a subclass whose calls are watched, and their records."""
    records = []
    kind = type(kind.__name__, (kind,), {"__call__": kind.__call__})
    calls.Calls(True, records.append).watch_class(kind)
    unet = diffusers.UNet2DModel(in_channels=3, out_channels=3, **SMALL_UNET, **KINDS)
    pipe = kind(unet, diffusers.DDIMScheduler(), **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe, records


def test_a_call_is_made_plain_and_accelerated_from_the_same_state():
    pipe, records = watched(diffusers.DDIMPipeline)
    for _ in range(2):
        output = pipe(num_inference_steps=3, output_type="np", eta=1.0).images
    assert [record["counts"] for record in records] == [{"fused without guidance": 3}] * 2
    assert all(record["difference"] < 1e-5 and record["varies"] for record in records)
    assert output.shape == (1, 8, 8, 3)


def test_a_wrong_step_is_seen(monkeypatch):
    pipe, records = watched(diffusers.DDIMPipeline)
    accelerate = calls.accelerate

    def wrong(pipe):
        done = accelerate(pipe)
        step = pipe.scheduler.step
        monkeypatch.setattr(pipe.scheduler, "step", lambda output, *rest, **named: step(1.01 * output, *rest, **named))
        return done

    monkeypatch.setattr(calls, "accelerate", wrong)
    pipe(num_inference_steps=3, output_type="np")
    assert records[0]["difference"] > findings.TOLERANCE[32]
    assert 0 < records[0]["rounding"] < 1e-5
    assert findings.by_pipeline([{"test": "a", **records[0]}])["DDIMPipeline"]["differ"][0]["test"] == "a"


def test_errors_of_both_calls_are_compared():
    pipe, records = watched(diffusers.DDIMPipeline)
    with pytest.raises(ValueError, match="generator"):
        pipe(batch_size=2, generator=[torch.Generator()] * 3)
    plain, accelerated = records[0]["errors"]
    assert plain == accelerated
    assert plain.startswith("ValueError: ")
    assert findings.by_pipeline([{"test": "a", **records[0]}])["DDIMPipeline"]["errors_differ"] == []


def test_what_rounding_explains_is_no_difference():
    record = {"test": "a", "pipeline": "P", "bits": 32, "counts": {}, "computed": {}, "tried": [], "left_alone": {}}
    record |= {"difference": 3e-4, "varies": True, "rounding": 2e-4}
    assert findings.by_pipeline([record])["P"]["differ"] == []
    assert len(findings.by_pipeline([record | {"rounding": 2e-5}])["P"]["differ"]) == 1


def test_verdicts_of_tests_that_fail_compared():
    ran = {
        "compared": {"a/passes": "passed", "a/watched": "failed", "b/alone": "failed", "b/numbers": "failed"},
        "accelerated": {"a/watched": "passed", "b/alone": "failed", "b/numbers": "failed"},
        "plain": {"a/watched": "passed", "b/alone": "passed", "b/numbers": "failed"},
    }

    def run(mode, tests):
        assert list(tests) == ["a", "b"] if mode == "compared" else ["a/watched", "b/alone", "b/numbers"]
        return [{"test": name, "outcome": outcome, "message": ""} for name, outcome in ran[mode].items()], ""

    found = findings.examined(run, ["a", "b"])
    verdicts = {
        name: {test: each["outcome"] for test, each in folder["tests"].items()} for name, folder in found.items()
    }
    assert verdicts["a"] == {"a/passes": "passed", "a/watched": "passed"}
    assert verdicts["b"] == {"b/alone": "broken", "b/numbers": "fails plain too"}
    assert findings.summary(found, ["APipeline"])["tests"] == {"passed": 2, "broken": 1, "fails plain too": 1}


def test_tests_run_in_a_process_of_their_own(tmp_path):
    folder = tmp_path / "tests" / "pipelines"
    folder.mkdir(parents=True)
    (folder / "test_tiny.py").write_text(
        textwrap.dedent(f"""
            import diffusers, torch
            def test_inference():
                unet = diffusers.UNet2DModel(in_channels=3, out_channels=3, **{SMALL_UNET}, **{KINDS})
                pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
                pipe(num_inference_steps=2)
                assert type(pipe.scheduler) is diffusers.DDIMScheduler
            def test_inference_skipped():
                __import__("pytest").skip("no hub")
            def test_other():
                assert False
        """)
    )
    setting = runs.Setting(tmp_path, Path(tmp_path, "hub"), "inference", 100)
    records, wrong = runs.run(setting, "accelerated", ["tests/pipelines"])
    assert wrong == ""
    assert runs.calls(records)[0]["counts"] == {"fused without guidance": 2}
    found = {test.split("::")[1]: record["outcome"] for test, record in runs.outcomes(records).items()}
    assert found == {"test_inference": "failed", "test_inference_skipped": "skipped"}
    assert "assert" in runs.outcomes(records)["tests/pipelines/test_tiny.py::test_inference"]["message"]
    records, wrong = runs.run(runs.Setting(tmp_path, tmp_path, "inference", 0.1), "plain", ["tests/pipelines"])
    assert (records, wrong) == ([], "stopped after 0.1 s")
