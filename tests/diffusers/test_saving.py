"""What is saved with parts of fastguide loads without it; only pickle keeps that a part is fastguide's."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

from tests.support.pipelines import FreePipeline, parts
from tests.support.scheduler_pair import NAMES, diffusers, fused

pytest.importorskip("transformers")


def test_a_pipeline_with_a_fused_scheduler_is_saved_and_loaded(tmp_path):
    unet = parts()["unet"]
    accelerated = diffusers.DDPMPipeline(unet, diffusers.DDIMScheduler(beta_schedule="scaled_linear"))
    fused.accelerate(accelerated)
    for pipe in (accelerated, diffusers.DDPMPipeline(unet, fused.DDIMScheduler(beta_schedule="scaled_linear"))):
        assert type(pipe.scheduler) is fused.DDIMScheduler
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert loaded.scheduler.config.beta_schedule == "scaled_linear"


class OwnScheduler(fused.DDIMScheduler):
    """A user's subclass, which is saved as it is."""


def test_classes_are_pickled_as_they_are():
    for cls in (*(getattr(fused, name) for name in NAMES), fused.guiders.ClassifierFreeGuidance, OwnScheduler):
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert copy.deepcopy(cls) is cls
    for cls in (fused.DDIMScheduler, OwnScheduler):
        for kept in (
            pickle.loads(pickle.dumps(cls(num_train_timesteps=77))),
            copy.deepcopy(cls(num_train_timesteps=77)),
        ):
            assert type(kept) is cls
            assert kept.config.num_train_timesteps == 77
    assert OwnScheduler.__module__ == __name__
    assert fused.DDIMScheduler.__module__ == diffusers.DDIMScheduler.__module__


def test_a_modular_pipeline_loads_without_fastguide(tmp_path):
    blocks = pytest.importorskip("diffusers.modular_pipelines").StableDiffusionXLAutoBlocks
    pipe = blocks().init_pipeline()
    pipe.update_components(
        scheduler=fused.DDIMScheduler(num_train_timesteps=77), guider=fused.guiders.ClassifierFreeGuidance(3.0)
    )
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    saved = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "DDIMScheduler" in saved
    assert "fastguide" not in saved
    load = (
        "import sys; sys.modules['fastguide'] = None; from diffusers.modular_pipelines import ModularPipeline;"
        f"pipe = ModularPipeline.from_pretrained({str(tmp_path)!r}); pipe.load_components('scheduler');"
        "print(type(pipe.scheduler), pipe.scheduler.config.num_train_timesteps)"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{diffusers.DDIMScheduler} 77", done.stderr


def test_an_accelerated_pipeline_is_pickled_and_copied():
    pipe = FreePipeline(torch.randn(2, 3, 4, 4))
    fused.accelerate(pipe)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(copy.deepcopy(pipe)(x, steps=3), pipe(x, steps=3))
