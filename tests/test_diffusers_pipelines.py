"""Real pipelines, small and randomly initialised: accelerated and restored, they make diffusers' images."""

from __future__ import annotations

import pytest
import torch
from scheduler_pair import diffusers, fused

pytest.importorskip("transformers")

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")
WIDTHS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def parts(in_channels=4):
    """A denoiser and an autoencoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **WIDTHS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **WIDTHS,
    )  # fmt: skip
    return {"unet": unet.eval(), "vae": vae.eval()}


def scheduler_of(name, **config):
    return getattr(diffusers, name)(beta_schedule="scaled_linear", clip_sample=False, **config)


def stable_diffusion(kind, scheduler, in_channels=4):
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = getattr(diffusers, kind)(**parts(in_channels), scheduler=scheduler, **nothing, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch=2):
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(2, batch, 5, 8, generator=generator)
    return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}


def images_of(pipe, **arguments):
    """Before, while accelerated, and after; and what the acceleration says."""

    def run():
        torch.manual_seed(2)  # not every pipeline gives its generator to the step
        generator = torch.Generator().manual_seed(1)
        images = torch.as_tensor(pipe(generator=generator, output_type="np", **arguments).images)
        return images, generator.get_state()

    before = run()
    done = fused.accelerate(pipe)
    assert fused.accelerate(pipe) is done
    during = run()
    fused.restore(pipe)
    after = run()
    assert torch.equal(before[0], after[0])
    assert before[0].isfinite().all()
    assert torch.equal(before[1], during[1])
    return before[0], during[0], done


@pytest.fixture
def steps(monkeypatch):
    """Guidance scales of the fused steps that were made."""
    scales = []
    real = fused.fused.guided_step

    def spy(table, row, sample, predictions, guidance, **others):
        scales.append(guidance)
        return real(table, row, sample, predictions, guidance, **others)

    monkeypatch.setattr(fused.fused, "guided_step", spy)
    return scales


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("name", "eta"), [("DDIMScheduler", 0.0), ("DDIMScheduler", 1.0), ("DDPMScheduler", 0.0)])
def test_text_to_image(name, eta, prediction_type, steps):
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of(name, prediction_type=prediction_type))
    before, during, done = images_of(pipe, **prompts(), num_inference_steps=4, guidance_scale=6.0, eta=eta)
    assert done.exchanged == {"scheduler": name}
    assert done.traced == ["unet"]
    assert not done.left_alone
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) == 4
    assert all(guidance.num_predictions == 2 for guidance in steps)


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"guidance_scale": 6.0, "guidance_rescale": 0.7}])
def test_what_the_pipeline_computes_besides_guidance_is_computed(options, steps):
    """No guidance at all, and guidance that is rescaled before the step: only the step is fused then."""
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler"))
    before, during, _ = images_of(pipe, **prompts(), num_inference_steps=4, **options)
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert steps == [None] * 4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image(name, steps):
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler_of(name))
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    before, during, _ = images_of(
        pipe, image=image, strength=0.6, **prompts(), num_inference_steps=10, guidance_scale=4.0
    )
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) == 6


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainting(name, in_channels, steps):
    pipe = stable_diffusion("StableDiffusionInpaintPipeline", scheduler_of(name), in_channels)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    before, during, _ = images_of(
        pipe, image=image, mask_image=mask, height=16, width=16, strength=1.0, **prompts(), num_inference_steps=5,
        guidance_scale=4.0,
    )  # fmt: skip
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) == 5


@pytest.mark.parametrize(("kind", "name"), [("DDPMPipeline", "DDPMScheduler"), ("DDIMPipeline", "DDIMScheduler")])
def test_unconditional(kind, name, steps):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        8, 3, 3, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **WIDTHS
    ).eval()
    pipe = getattr(diffusers, kind)(unet, getattr(diffusers, name)())
    pipe.set_progress_bar_config(disable=True)
    for options in ({}, {"eta": 1.0}) if kind == "DDIMPipeline" else ({},):
        before, during, _ = images_of(pipe, batch_size=2, num_inference_steps=4, **options)
        torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) >= 4


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("learned", [False, True])
def test_class_conditional_with_a_learned_variance(name, learned, steps):
    """DiT combines the first channels by itself, conditional half first: only its step is fused."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8 if learned else 4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, parts()["vae"], getattr(diffusers, name)(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    before, during, done = images_of(pipe, class_labels=[1, 5], num_inference_steps=4, guidance_scale=3.0)
    assert done.traced == ["transformer"]
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) == 4


def test_another_scheduler_is_named_and_left_alone():
    scheduler = diffusers.PNDMScheduler()
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    done = fused.accelerate(pipe)
    assert pipe.scheduler is scheduler
    assert done.left_alone["scheduler"].startswith("PNDMScheduler: only DDIMScheduler, DDPMScheduler")
    assert "guidance goes to a scheduler that is left alone" in done.left_alone["unet"]
    fused.restore(pipe)


def test_a_scheduler_that_is_fused_already_keeps_its_place():
    scheduler = fused.DDIMScheduler(clip_sample=False)
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    assert fused.accelerate(pipe).traced == ["unet"]
    assert pipe.scheduler is scheduler
    fused.restore(pipe)
    assert pipe.scheduler is scheduler


def test_a_pipeline_with_a_fused_scheduler_is_saved_and_loaded(tmp_path):
    unet = parts()["unet"]
    pipe = diffusers.DDIMPipeline(unet, fused.DDIMScheduler(beta_schedule="scaled_linear"))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.beta_schedule == "scaled_linear"


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline, got DDIMScheduler"):
        fused.accelerate(diffusers.DDIMScheduler())
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler"))
    with pytest.raises(ValueError, match=r"pipe: expected one that accelerate\(\) was called on"):
        fused.restore(pipe)
