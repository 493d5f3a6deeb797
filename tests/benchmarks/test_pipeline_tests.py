"""The command that runs diffusers' tests accelerated: what it compares, records, and calls broken."""

from __future__ import annotations

import copy
import functools
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.scheduler_pair import diffusers

compare = pytest.importorskip("benchmarks.pipeline_tests.compare")
calls = pytest.importorskip("benchmarks.pipeline_tests.calls")
findings = pytest.importorskip("benchmarks.pipeline_tests.findings")
plain_steps = pytest.importorskip("benchmarks.pipeline_tests.plain_steps")
runs = pytest.importorskip("benchmarks.pipeline_tests.runs")
summaries = pytest.importorskip("benchmarks.pipeline_tests.summaries")

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


def test_the_default_generator_is_not_copied():
    generator = torch.manual_seed(3)
    assert compare.copied([generator])[0] is generator


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
    assert [record["plain_steps"] for record in records] == [{"made": 3, "guided": 0}] * 2
    assert all(record["difference"] < 1e-5 and record["varies"] for record in records)
    assert output.shape == (1, 8, 8, 3)


def make_wrong_steps(monkeypatch):
    """Let accelerated pipelines make steps of 1.01 times the model's output."""
    accelerate = calls.accelerate

    def wrong(pipe):
        done = accelerate(pipe)
        step = pipe.scheduler.step
        monkeypatch.setattr(pipe.scheduler, "step", lambda output, *rest, **named: step(1.01 * output, *rest, **named))
        return done

    monkeypatch.setattr(calls, "accelerate", wrong)


class BlackDecoder(torch.nn.Module):
    def decode(self, latents):
        return np.zeros_like(latents)


class DecodingPipeline(diffusers.DDIMPipeline):
    def __call__(self, **keywords):
        return self.vae.decode(super().__call__(output_type="np", **keywords).images)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_what_is_decoded_is_compared(monkeypatch, is_wrong):
    """Also where the decoder makes the same of everything, as Allegro's does of pictures smaller than its tiles."""
    pipe, records = watched(DecodingPipeline)
    pipe.vae = BlackDecoder()
    if is_wrong:
        make_wrong_steps(monkeypatch)
    assert not pipe(num_inference_steps=3).any()
    assert records[0]["varies"]
    assert (records[0]["difference"] > findings.TOLERANCE[32]) == is_wrong
    assert pipe.vae.decode.__func__ is BlackDecoder.decode


def test_a_wrong_step_is_seen(monkeypatch):
    pipe, records = watched(diffusers.DDIMPipeline)
    make_wrong_steps(monkeypatch)
    pipe(num_inference_steps=3, output_type="np")
    assert records[0]["difference"] > findings.TOLERANCE[32]
    assert 0 < records[0]["rounding"] < 1e-5
    assert findings.by_pipeline([{"test": "a", **records[0]}])["DDIMPipeline"]["differ"][0]["test"] == "a"


class Predicts(torch.nn.Module):
    def forward(self, sample):
        return (sample * 0.5,)


def test_steps_of_a_copied_scheduler_and_predictions_of_several_calls_are_counted():
    scheduler, model, sample = diffusers.FlowMatchEulerDiscreteScheduler(), Predicts(), torch.randn(2, 3)
    step, counter = type(scheduler).step, plain_steps.StepCounter()
    with counter.watching([scheduler], [model]):
        scheduler.set_timesteps(4)
        own = copy.deepcopy(scheduler)  # as pipelines of pictures and sound do
        for number, timestep in enumerate(scheduler.timesteps):
            outputs = [model(sample)[0] for _ in range(1 if number == 1 else 2)]
            own.step(outputs[-1] if number < 3 else torch.zeros_like(sample), timestep, sample)
            scheduler.step(outputs[0], timestep, sample)
    assert (counter.made, counter.guided) == (8, 5)
    assert own.step_index == scheduler.step_index == 4
    assert type(scheduler).step is step
    model(sample)
    assert not model._forward_hooks


@pytest.mark.parametrize("is_guided", [False, True])
def test_guidance_of_a_sample_that_is_there_twice_is_counted(is_guided):
    """As DiT's; without guidance, the halves of a batch are samples."""
    scheduler, model, counter = diffusers.FlowMatchEulerDiscreteScheduler(), Predicts(), plain_steps.StepCounter()
    scheduler.set_timesteps(2)
    with counter.watching([scheduler], [model]):
        for timestep in scheduler.timesteps:
            output = model(torch.randn(4, 3))[0]
            if is_guided:
                first, second = output.chunk(2)
                output = torch.cat([first + 2 * (second - first)] * 2)
            scheduler.step(output, timestep, torch.randn(2, 3).repeat(2, 1))
    assert (counter.made, counter.guided) == (2, 2 * is_guided)


class FillsACache(torch.nn.Module):
    def forward(self, sample, kind):
        return kind(sample=None, keys="keys") if kind is SimpleNamespace else kind([None, "keys"])


@pytest.mark.parametrize("kind", [tuple, SimpleNamespace])
def test_a_call_that_fills_a_cache_predicts_nothing(kind):
    scheduler, model, sample = diffusers.FlowMatchEulerDiscreteScheduler(), Predicts(), torch.randn(2, 3)
    filling, counter = FillsACache(), plain_steps.StepCounter()
    scheduler.set_timesteps(2)
    with counter.watching([scheduler], [filling, model]):
        for timestep in scheduler.timesteps:
            filling(torch.cat([sample, sample]), kind)
            scheduler.step(model(sample)[0], timestep, sample)
    assert (counter.made, counter.guided) == (2, 0)


def test_a_copied_scheduler_rounds_its_own_samples():
    scheduler, samples = diffusers.FlowMatchEulerDiscreteScheduler(), []
    with plain_steps.steps_wrapped([scheduler], functools.partial(plain_steps.rounding, 0)):
        scheduler.set_timesteps(2)
        own, output, sample = copy.deepcopy(scheduler), torch.randn(1, 64), torch.randn(1, 64)
        for each in (scheduler, own):
            samples.append(each.step(output, each.timesteps[0], sample).prev_sample)
    scheduler._step_index = None
    exact = scheduler.step(output, scheduler.timesteps[0], sample).prev_sample
    for found in samples:
        assert 0 < (found - exact).abs().max() < 1e-5 * exact.abs().max()


def counted(made, guided, counts, computed=()):
    record = {"test": "a", "pipeline": "P", "bits": 32, "tried": [], "left_alone": {}}
    record |= {"counts": counts, "computed": dict.fromkeys(computed, 1)}
    return record | {"plain_steps": {"made": made, "guided": guided}}


@pytest.mark.parametrize(
    ("record", "differs"),
    [
        (counted(3, 2, {"fused with guidance": 2, "fused without guidance": 1}), False),
        (counted(3, 2, {"fused with guidance": 2}), True),
        (counted(2, 1, {"fused with guidance": 2}), True),
        (counted(2, 2, {"fused without guidance": 2}), True),
        (counted(2, 2, {"fused without guidance": 2}, ["norm"]), False),
        (counted(2, 2, {"fused with guidance": 1}) | {"errors": ["a", "a"]}, False),
    ],
)
def test_counts_are_the_steps_and_the_guidance_of_the_plain_call(record, differs):
    assert bool(findings.by_pipeline([record])["P"]["counts_differ"]) == differs


def test_errors_of_both_calls_are_compared():
    pipe, records = watched(diffusers.DDIMPipeline)
    with pytest.raises(ValueError, match="generator"):
        pipe(batch_size=2, generator=[torch.Generator()] * 3)
    plain, accelerated = records[0]["errors"]
    assert plain == accelerated
    assert plain.startswith("ValueError: ")
    assert findings.by_pipeline([{"test": "a", **records[0]}])["DDIMPipeline"]["errors_differ"] == []


def test_words_that_a_test_counts_on_are_tokens_of_the_stand_in():
    hub = pytest.importorskip("benchmarks.pipeline_tests.hub")
    text = " on the provided source image (first image) and target image (second image), create an interesting text"
    tokens = hub._qwen().tokenize(text)
    assert tokens == [
        *("Ġon", "Ġthe", "Ġprovided", "Ġsource", "Ġimage", "Ġ(", "first", "Ġimage", ")", "Ġand", "Ġtarget", "Ġimage"),
        *("Ġ(", "second", "Ġimage", ")", ",", "Ġcreate", "Ġan", "Ġinteresting", "Ġtext"),
    ]


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
    assert summaries.summary(found, ["APipeline"])["tests"] == {"passed": 2, "broken": 1, "fails plain too": 1}


def test_a_brief_report_has_numbers_alone():
    plain = {"outcome": "fails plain too", "message": "huggingface_hub.errors.NoFile: not in /home/name/hub"}
    tests = {"a": {"outcome": "passed", "plain": "not run"}, "b": plain | {"plain": "failed"}}
    pipelines = findings.by_pipeline([counted(2, 1, {"fused with guidance": 2})])
    report = {"machine": {"date": "today", "processor": "fast"}, "expression": "inference"}
    report["folders"] = {"some": {"tests": tests, "pipelines": pipelines, "wrong": ["stopped after 9 s"]}}
    report["folders"] = summaries.with_setting(report["folders"], report["machine"] | {"date": "before"}, "batch")
    report["summary"] = summaries.summary(report["folders"], ["P"])
    found = summaries.brief(report)
    assert found["machine"] == {"date": "today"}
    assert found["summary"]["counts that differ"] == 1
    assert found["folders"]["some"] == {
        **{"passed": 1, "fails plain too": 1, "calls": 1, "compared": 0, "differ": 0, "errors_differ": 0},
        **{"counts_differ": 1, "plain failures": {"NoFile": 1}, "stopped": 1, "largest": 0.0},
        **{"steps": {"fused with guidance": 2}, "steps with guidance": 1},
        "setting": {"date": "before", "expression": "batch"},
    }
    assert "name" not in json.dumps(found)


def test_folders_that_a_stopped_process_did_not_come_to_run_again():
    folders = {"whole": {"tests": {"a": {}}, "wrong": []}, "partly": {"tests": {"a": {}}, "wrong": ["stopped"]}}
    folders |= {"none chosen": {"tests": {}, "wrong": []}, "not begun": {"tests": {}, "wrong": ["stopped"]}}
    assert list(summaries.reached(folders)) == ["whole", "partly", "none chosen"]


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
