"""Test the report of diffusers' pipelines: default schedulers, combined pipelines, shares, and the command."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import pytest

pytest.importorskip("transformers")  # without it, diffusers has hardly any pipelines

from benchmarks.coverage import __main__ as command
from benchmarks.coverage import page
from benchmarks.coverage.defaults import default_scheduler, scheduler_arguments
from benchmarks.coverage.forms import FUSED_FORMS
from benchmarks.coverage.rows import Shares, row_of, served_names, shares
from benchmarks.coverage.sources import pipeline_classes, source_in, source_of

BATCH, CALLS = "one call", "two calls"
U_FORM, C_FORM = "u + s(c - u)", "c + s(c - u)"

COMBINED = """
class PriorPipeline:
    def __init__(self, prior, scheduler: UnCLIPScheduler):
        pass

    def __call__(self, latents, s=4.0):
        u, c = self.prior(latents).predicted_image_embedding.chunk(2)
        return self.scheduler.step(u + s * (c - u), 0, latents)


class DecoderPipeline:
    def __init__(self, unet, scheduler: DDIMScheduler):
        pass

    def __call__(self, latents, s=4.0):
        u, c = self.unet(latents)[0].chunk(2)
        return self.scheduler.step(u + s * (c - u), 0, latents)


class CombinedPipeline:
    def __init__(self, unet, prior, scheduler: DDIMScheduler, prior_scheduler: UnCLIPScheduler):
        self.first = PriorPipeline(prior=prior, scheduler=prior_scheduler)
        self.second = DecoderPipeline(unet=unet, scheduler=scheduler)

    def __call__(self, latents):
        return self.second(self.first(latents))
"""


def test_a_combined_pipeline_is_served_if_all_its_parts_are():
    sources = {name: source_in(COMBINED, name) for name in ("PriorPipeline", "DecoderPipeline", "CombinedPipeline")}
    decoder = row_of(sources["DecoderPipeline"], {"DDIMScheduler"}, sources.get)
    assert (decoder.served, decoder.fused, decoder.reasons) == (True, True, ())
    row = row_of(sources["CombinedPipeline"], {"DDIMScheduler"}, sources.get)
    assert (row.scheduler, row.other_schedulers) == ("DDIMScheduler", {"prior_scheduler": "UnCLIPScheduler"})
    assert not row.served
    assert row.reasons == ("UnCLIPScheduler is not served",)
    assert row_of(sources["CombinedPipeline"], {"DDIMScheduler", "UnCLIPScheduler"}, sources.get).served


SCHEDULED = {  # annotation, what is done in __init__, the example; class, by what
    "one class": ("DDIMScheduler", "", "", ("DDIMScheduler", "annotation")),
    "one class as text": ("'DDIMScheduler | None'", "", "", ("DDIMScheduler", "annotation")),
    "init": (
        "DDIMScheduler | DPMSolverMultistepScheduler",
        "if wrong: scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)",
        ">>> pipe.scheduler = LCMScheduler.from_config(c)", ("DPMSolverMultistepScheduler", "init"),
    ),
    "example that exchanges": (
        "KarrasDiffusionSchedulers", "", ">>> pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)",
        ("LCMScheduler", "example"),
    ),
    "example that makes": (
        "DDIMScheduler | PNDMScheduler", "", ">>> pipe = Pipeline(unet, scheduler=PNDMScheduler(0.1))",
        ("PNDMScheduler", "example"),
    ),
    "not the one for inversion": (
        "SchedulerMixin", "",
        ">>> p.inverse_scheduler = DDIMInverseScheduler.from_config(c)\n"
        "    >>> p.scheduler = DDIMScheduler.from_config(c)",
        ("DDIMScheduler", "example"),
    ),
    "checkpoint": (
        "KarrasDiffusionSchedulers", "",
        ">>> adapter = T.from_pretrained('a/b')\n"
        "    >>> Pipeline.from_pretrained('Kwai-Kolors/Kolors-diffusers', adapter)",
        ("EulerDiscreteScheduler", "checkpoint"),
    ),
    "nothing": ("KarrasDiffusionSchedulers", "", ">>> Pipeline.from_pretrained('a/b')", ("unknown", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("constant", [False, True])
def test_the_default_scheduler(name, constant):
    """The example is in the docstring, or in a constant that is put there."""
    annotation, init, example, expected = SCHEDULED[name]
    docstring, decorator = ("", "@replace_example_docstring(TEXT)") if constant else (example, "")
    text = f'''
TEXT = """
    {example}
"""

class Pipeline:
    """{docstring}"""
    def __init__(self, unet, scheduler: {annotation}, low_res_scheduler: DDPMScheduler):
        {init or "pass"}

    {decorator}
    def __call__(self):
        pass
'''
    source = source_in(text, "Pipeline")
    assert scheduler_arguments(source) == ["scheduler", "low_res_scheduler"]
    assert default_scheduler(source)[:2] == expected


def test_a_default_scheduler_against_its_annotation():
    text = "class WanPipeline:\n    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler):\n        pass"
    scheduler, by, origin = default_scheduler(source_in(text, "WanPipeline"))
    assert (scheduler, by) == ("UniPCMultistepScheduler", "checkpoint")
    assert origin == "Wan-AI/Wan2.1-T2V-14B-Diffusers: a conversion script"


def row(served, form, changes=(), **options):
    made = row_of(source_in(COMBINED, "DecoderPipeline"), {"DDIMScheduler"})
    is_fused = FUSED_FORMS[form] and not changes
    return dataclasses.replace(made, served=served, form=form, changes=changes, fused=is_fused, **options)


def test_shares_are_counted():
    rows = [
        row(True, U_FORM),
        row(True, "none"),
        row(True, "more conditions"),
        row(True, C_FORM, ("arithmetic before",)),
        row(False, "embedded"),
        row(False, "lerp", deprecated=True),
    ]
    assert shares(rows) == Shares(pipelines=6, served=4, fully_fused=2, form_fused=3, guided=1)
    assert shares([]) == Shares(0, 0, 0, 0, 0)
    text = page.report(rows)
    assert "default scheduler served           4 of 6,  66.7 %    without deprecated ones   4 of 5,  80.0 %" in text
    assert "fully fused                        2 of 6,  33.3 %    without deprecated ones   2 of 5,  40.0 %" in text
    assert "arithmetic before                          1                 1" in text


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the command prints for the installed diffusers, and the rows that it writes."""
    file = tmp_path_factory.mktemp("coverage") / "coverage.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command.main(["--json", str(file)]) == 0
    return printed.getvalue(), json.loads(file.read_text())


def test_every_pipeline_with_a_scheduler_has_a_row(report):
    _, found = report
    expected = [cls.__name__ for cls in pipeline_classes() if scheduler_arguments(source_of(cls))]
    assert [row["pipeline"] for row in found["rows"]] == expected
    assert len(expected) > 200


UNKNOWN_DEFAULTS = frozenset()
NOT_FOUND = {"LTX2VideoDiffusionDecodePipeline"}  # its decoder makes the steps
OTHER = frozenset()


def test_every_row_says_what_it_is_and_why(report):
    _, found = report
    rows = found["rows"]
    assert {row["pipeline"] for row in rows if row["scheduler"] == "unknown"} <= UNKNOWN_DEFAULTS
    assert {row["pipeline"] for row in rows if row["form"] == "not found"} <= NOT_FOUND
    assert {row["pipeline"] for row in rows if row["form"] == "other"} <= OTHER
    for row in rows:
        assert row["form"] in FUSED_FORMS
        assert (row["reasons"] == []) == (row["served"] and row["fused"])
        assert (row["by"] == "checkpoint") == bool(row["origin"])


def test_the_command_prints_the_shares_and_what_is_left(report):
    text, found = report
    counted = found["shares"]
    assert f"{counted['fully_fused']:3} of {counted['pipelines']}" in text
    assert 0 < counted["fully_fused"] <= counted["form_fused"] <= counted["served"] <= counted["pipelines"]
    for row in found["rows"]:
        assert (f"\n{row['pipeline']:48} " in text) == bool(row["reasons"])


def test_the_command_counts_others_as_served_and_refuses_what_is_none(monkeypatch, capsys, tmp_path):
    given = []
    monkeypatch.setattr(command, "installed_rows", lambda served: given.append(served) or [])
    assert command.main(["--also", "AmusedScheduler"]) == 0
    assert given == [{*served_names(), "AmusedScheduler"}]
    assert command.main(["--also", "NoScheduler"]) == 2
    assert "--also: expected a scheduler of diffusers', got 'NoScheduler'" in capsys.readouterr().err
    assert command.main(["--json", str(tmp_path / "missing" / "file.json")]) == 2
    assert len(given) == 1


BY_HAND = {  # what somebody saw who read the pipeline: form, calls, changes
    "AceStepPipeline": ("adaptive projected", "", []),
    "AllegroPipeline": (U_FORM, BATCH, []),
    "AuraFlowPipeline": (U_FORM, BATCH, []),
    "BriaPipeline": (U_FORM, BATCH, []),
    "ChromaPipeline": (U_FORM, CALLS, []),
    "CogVideoXPipeline": (U_FORM, BATCH, ["cast before"]),
    "CogView4Pipeline": (U_FORM, CALLS, []),
    "Cosmos2_5_PredictBasePipeline": (C_FORM, CALLS, ["sum before", "masked before"]),
    "Cosmos2TextToImagePipeline": (
        C_FORM, CALLS, ["cast before", "sum before", "multiple before", "multiple after", "sum after"],
    ),
    "CycleDiffusionPipeline": (U_FORM, BATCH, ["not in halves"]),
    "DDPMPipeline": ("none", "", []),
    "EasyAnimatePipeline": (U_FORM, BATCH, []),
    "Flux2KleinPipeline": (U_FORM, CALLS, ["slice before"]),
    "FluxPipeline": ("embedded", "", []),
    "HiDreamImagePipeline": (U_FORM, BATCH, ["negate before"]),
    "HunyuanDiTPipeline": (U_FORM, BATCH, ["split before"]),
    "HunyuanVideo15Pipeline": ("own guider", "", []),
    "Ideogram4Pipeline": ("weights", "", []),
    "IFPipeline": (U_FORM, BATCH, ["split before", "split after", "shape after"]),
    "Kandinsky3Pipeline": ("weights", "", []),
    "Kandinsky5T2IPipeline": (U_FORM, CALLS, ["slice after"]),
    "Kandinsky5T2VPipeline": (U_FORM, CALLS, []),
    "Kandinsky6TI2VAPipeline": (U_FORM, CALLS, ["one by one before"]),
    "Krea2Pipeline": (C_FORM, CALLS, []),
    "LatentConsistencyModelPipeline": ("embedded", "", []),
    "LEditsPPPipelineStableDiffusion": ("more conditions", "", []),
    "LTXConditionPipeline": (U_FORM, BATCH, ["negate after"]),
    "LTX2Pipeline": ("rescaled", "", []),
    "LongCatAudioDiTPipeline": (U_FORM, CALLS, []),
    "Lumina2Pipeline": ("norm rescaled", "", []),
    "MarigoldDepthPipeline": ("none", "", []),
    "MochiPipeline": (U_FORM, BATCH, ["cast before"]),
    "OmniGenPipeline": (U_FORM, BATCH, ["split before"]),
    "PixArtAlphaPipeline": (U_FORM, BATCH, ["split after"]),
    "QwenImagePipeline": ("norm rescaled", "", []),
    "QwenImage21Pipeline": (U_FORM, CALLS, ["slice before"]),
    "SanaPipeline": (U_FORM, BATCH, ["cast before"]),
    "SanaSprintPipeline": ("embedded", "", []),
    "StableCascadePriorPipeline": ("lerp", "", []),
    "StableDiffusion3Pipeline": (U_FORM, BATCH, []),
    "StableDiffusionGLIGENTextImagePipeline": (U_FORM, CALLS, ["halves of two calls"]),
    "StableDiffusionInstructPix2PixPipeline": ("several conditions", "", []),
    "StableDiffusionPAGPipeline": ("perturbed attention", "", []),
    "StableDiffusionPanoramaPipeline": (U_FORM, BATCH, ["slice before"]),
    "StableDiffusionSAGPipeline": ("extra passes", "", []),
    "StableDiffusionXLPipeline": (U_FORM, BATCH, []),
    "StableVideoDiffusionPipeline": ("scale per frame", "", []),
    "TextToVideoSDPipeline": (U_FORM, BATCH, ["shape after"]),
    "UniDiffuserPipeline": ("several conditions", "", []),
    "VersatileDiffusionTextToImagePipeline": (U_FORM, BATCH, []),
    "WanPipeline": (U_FORM, CALLS, []),
    "ZImagePipeline": (
        C_FORM, BATCH, ["cast before", "slice before", "cast after", "negate after", "shape after"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_pipelines_that_were_read_by_hand(name, report):
    rows = {row["pipeline"]: row for row in report[1]["rows"]}
    if name not in rows or report[1]["diffusers"] != "0.42.1":
        pytest.skip("another diffusers than the one that was read")
    row = rows[name]
    assert (row["form"], row["calls"], row["changes"]) == BY_HAND[name]
