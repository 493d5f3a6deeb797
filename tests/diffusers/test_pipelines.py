"""Real pipelines, small and randomly initialised: accelerated and restored, they make diffusers' images."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide.step.repeat import token_of
from tests.support.pipelines import WIDTHS, parts, prompts, scheduler_of, stable_diffusion
from tests.support.scheduler_pair import diffusers, fused

pytest.importorskip("transformers")

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")


def images_of(pipe, **arguments):
    """Return the images before and during acceleration, and what ``accelerate`` returned; then restore and compare."""

    def run():
        torch.manual_seed(2)  # not every pipeline gives its generator to the step
        generator = torch.Generator().manual_seed(1)
        images = torch.as_tensor(pipe(generator=generator, output_type="np", **arguments).images)
        return images, generator.get_state()

    before = run()
    done = fused.accelerate(pipe)
    assert fused.accelerate(pipe) == done
    during = run()
    fused.restore(pipe)
    after = run()
    assert torch.equal(before[0], after[0])
    assert before[0].isfinite().all()
    assert torch.equal(before[1], during[1])
    return before[0], during[0], done


@pytest.fixture
def steps(monkeypatch):
    """Collect the guidance of each fused step."""
    scales, by_token = [], {}
    real = fused.scheduler_step.guided_step

    def spy(table, row, sample, predictions, guidance, **others):
        by_token[token_of(guidance)] = guidance
        scales.append(guidance)
        return real(table, row, sample, predictions, guidance, **others)

    again = fused.repeat.repeat

    def spy_again(kinds, row, sample, predictions, token, *others):
        result = again(kinds, row, sample, predictions, token, *others)
        if result is not None:
            scales.append(by_token[token])
        return result

    monkeypatch.setattr(fused.scheduler_step, "guided_step", spy)
    monkeypatch.setattr(fused.repeat, "repeat", spy_again)
    return scales


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("name", "eta"), [("DDIMScheduler", 0.0), ("DDIMScheduler", 1.0), ("DDPMScheduler", 0.0)])
def test_text_to_image(name, eta, prediction_type, steps):
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of(name, prediction_type=prediction_type))
    before, during, done = images_of(pipe, **prompts(), num_inference_steps=4, guidance_scale=6.0, eta=eta)
    assert done.exchanged == {"scheduler": name}
    assert done.tried == ["unet"]
    assert not done.left_alone
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) == 4
    assert all(guidance.num_predictions == 2 for guidance in steps)


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"guidance_scale": 6.0, "guidance_rescale": 0.7}])
def test_guidance_that_is_off_or_rescaled(options, steps):
    """Rescaled guidance is made in the step as well, of the predictions' deviations."""
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler"))
    before, during, done = images_of(pipe, **prompts(), num_inference_steps=4, **options)
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    rescaled = "guidance_rescale" in options
    assert [guidance is not None and guidance.weights_from is not None for guidance in steps] == [rescaled] * 4
    assert not done.computed


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
    """DiT guides the first channels, conditional half first, and makes the step of two of each sample."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8 if learned else 4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, parts()["vae"], getattr(diffusers, name)(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    before, during, done = images_of(pipe, class_labels=[1, 5], num_inference_steps=4, guidance_scale=3.0)
    assert (done.left_alone, done.counts) == ({}, {"fused with guidance": 4})
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert len(steps) == 4


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_of_a_pipeline_s_parts_gives_its_latents(name, spacing):
    scheduler = scheduler_of(name, timestep_spacing=spacing)
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    embeds = prompts()
    torch.manual_seed(0)
    expected = pipe(latents=x_T, **embeds, num_inference_steps=4, guidance_scale=6.0, output_type="latent").images
    timesteps = scheduler.timesteps
    sampler = fused.sampler_from_pipeline(pipe, 4, fastguide.ClassifierFree(6.0))
    torch.manual_seed(0)
    got = sampler(x_T, cond=embeds["prompt_embeds"], uncond=embeds["negative_prompt_embeds"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert scheduler.timesteps is timesteps
    named = sampler(
        x_T,
        cond={"encoder_hidden_states": embeds["prompt_embeds"]},
        uncond={"encoder_hidden_states": embeds["negative_prompt_embeds"]},
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(named, got)


def transformer_of_classes():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip


def test_a_sampler_leaves_out_a_variance_that_its_scheduler_does_not_take():
    transformer = transformer_of_classes()
    pipe = diffusers.DiTPipeline(transformer, parts()["vae"], diffusers.DDIMScheduler(clip_sample=False))
    x_T, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 5])
    got = fused.sampler_from_pipeline(pipe, 3)(x_T, cond=labels)
    pipe.scheduler.set_timesteps(3)
    x = x_T
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(transformer(x, t.expand(2), labels).sample[:, :4], t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_a_sampler_gives_mappings_of_mappings_to_the_denoiser():
    """SDXL's unet needs them."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56, **WIDTHS,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(2)

    def condition():
        added = {"text_embeds": torch.randn(2, 8, generator=generator), "time_ids": torch.ones(2, 6)}
        return {"encoder_hidden_states": torch.randn(2, 5, 8, generator=generator), "added_cond_kwargs": added}

    cond, uncond = condition(), condition()
    table = fused.step_table(scheduler_of("DDIMScheduler"), 3)
    x_T = torch.randn(2, 4, 8, 8, generator=generator)
    got = fastguide.Sampler(fused.as_model(unet), table, fastguide.ClassifierFree(4.0))(x_T, cond=cond, uncond=uncond)
    x = x_T
    with torch.no_grad():
        for step, t in enumerate(table.timesteps):
            outputs = [unet(x, t.expand(2), **c).sample for c in (uncond, cond)]
            x = fastguide.guided_step(table, step, x, outputs, fastguide.ClassifierFree(4.0))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    sampler = fastguide.Sampler(fused.as_model(unet), table, fastguide.ClassifierFree(4.0))
    with pytest.raises(ValueError, match=r"uncond\['added_cond_kwargs'\]: expected a mapping with the keys"):
        sampler(x_T, cond=cond, uncond={**uncond, "added_cond_kwargs": {}})


def test_a_sampler_of_classes_with_a_learned_variance():
    transformer = transformer_of_classes()
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer, parts()["vae"], scheduler)
    sampler = fused.sampler_from_pipeline(pipe, 4, fastguide.ClassifierFree(3.0))
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, null = torch.tensor([1, 5]), torch.tensor([1000, 1000])
    got = sampler(x_T, cond=labels, uncond=null, generator=torch.Generator().manual_seed(2))
    scheduler.set_timesteps(4)
    x, generator = x_T, torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = transformer(torch.cat([x, x]), t.expand(4), torch.cat([null, labels])).sample
            (uncond, _), (cond, variance) = (half.chunk(2, 1) for half in output.chunk(2))
            x = scheduler.step(torch.cat([uncond + 3.0 * (cond - uncond), variance], 1), t, x, generator).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_what_a_sampler_cannot_be_made_of_is_refused():
    pipe = stable_diffusion("StableDiffusionPipeline", diffusers.KarrasVeScheduler())
    with pytest.raises(TypeError, match="scheduler: expected one whose loop is a table of steps, got KarrasVe"):
        fused.sampler_from_pipeline(pipe)
    for kind in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe.scheduler = kind(thresholding=True, sample_max_value=0.5)
        with pytest.raises(ValueError, match="dynamic thresholding by numbers out of their range"):
            fused.sampler_from_pipeline(pipe)
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline, got Linear"):
        fused.sampler_from_pipeline(torch.nn.Linear(1, 1))
    pipe.scheduler = scheduler_of("DDIMScheduler")
    for arguments, message in (
        ({"num_inference_steps": 0}, "num_inference_steps: expected 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: expected an integer, got 2.5"),
        ({"eta": 2}, "eta: expected 0 to 1 with DDIM, and 0 with DDPM, got 2"),
        ({"eta": "1"}, "eta: expected a number from 0 to 1, got '1'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fused.sampler_from_pipeline(pipe, **arguments)
    with pytest.raises(TypeError, match="denoiser: expected a model of diffusers, got NoneType"):
        fused.as_model(None)
    model = fused.as_model(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="cond: expected none, or a mapping, for Conv2d, got a tensor"):
        model(torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_another_scheduler_is_named_and_left_alone():
    scheduler = diffusers.KarrasVeScheduler()
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    done = fused.accelerate(pipe)
    assert pipe.scheduler is scheduler
    assert done.left_alone["scheduler"].startswith("KarrasVeScheduler: it is not served")
    assert list(done.left_alone) == ["scheduler"]
    fused.restore(pipe)
    thresholding = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler", thresholding=True))
    assert not fused.accelerate(thresholding).left_alone
    fused.restore(thresholding)
    thresholding.scheduler.register_to_config(sample_max_value=0.5)
    before = thresholding.scheduler
    assert "dynamic thresholding" in fused.accelerate(thresholding).left_alone["scheduler"]
    assert thresholding.scheduler is before
    warm = stable_diffusion("StableDiffusionPipeline", scheduler_of_pndm())
    done = fused.accelerate(warm)
    assert done.left_alone == {
        "scheduler": "PNDMScheduler: a warm-up by Runge and Kutta's method is not in the fused step"
    }
    assert type(warm.scheduler) is diffusers.PNDMScheduler


def scheduler_of_pndm():
    return diffusers.PNDMScheduler(beta_schedule="scaled_linear")


def test_a_scheduler_that_is_fused_already_stays():
    scheduler = fused.DDIMScheduler(clip_sample=False)
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    assert fused.accelerate(pipe).tried == ["unet"]
    assert pipe.scheduler is scheduler
    fused.restore(pipe)
    assert pipe.scheduler is scheduler


def test_parts_that_are_exchanged_after_acceleration():
    """A second call accelerates them; restoring leaves them in place."""
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler"))
    first, unet = pipe.scheduler, pipe.unet
    fused.accelerate(pipe)
    own, pipe.unet = scheduler_of("DDPMScheduler"), parts()["unet"]
    pipe.scheduler = own
    assert fused.accelerate(pipe).exchanged == {"scheduler": "DDPMScheduler"}
    assert type(pipe.scheduler) is fused.DDPMScheduler
    assert [each._compiled_call_impl is None for each in (unet, pipe.unet)] == [True, False]
    fused.restore(pipe)
    assert pipe.scheduler is own
    assert pipe.unet._compiled_call_impl is None
    pipe.scheduler = first
    fused.accelerate(pipe)
    pipe.scheduler = own
    fused.restore(pipe)
    assert pipe.scheduler is own


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline, got DDIMScheduler"):
        fused.accelerate(diffusers.DDIMScheduler())
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler"))
    with pytest.raises(ValueError, match=r"pipe: expected one that accelerate\(\) was called on"):
        fused.restore(pipe)
    for nothing in (None, diffusers.DDIMScheduler):
        with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline, got"):
            fused.restore(nothing)


def test_an_inverse_scheduler_is_exchanged_as_well():
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionDiffEditPipeline(
        **parts(), **nothing, scheduler=scheduler_of("DDIMScheduler"), requires_safety_checker=False,
        inverse_scheduler=scheduler_of("DDIMInverseScheduler"),
    )  # fmt: skip
    before = pipe.inverse_scheduler
    done = fused.accelerate(pipe)
    assert done.exchanged == {"scheduler": "DDIMScheduler", "inverse_scheduler": "DDIMInverseScheduler"}
    assert type(pipe.inverse_scheduler) is fused.DDIMInverseScheduler
    fused.restore(pipe)
    assert pipe.inverse_scheduler is before


def test_a_sampler_has_the_eta_and_dtype_it_is_made_with():
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler"))
    sampler = fused.sampler_from_pipeline(pipe, 4, eta=0.5, dtype=torch.bfloat16)
    assert sampler.dtype == torch.bfloat16
    assert torch.equal(sampler.table.rows, fused.step_table(pipe.scheduler, 4, eta=0.5).rows)
    assert sampler.table.adds_noise_anywhere


@pytest.mark.parametrize("steps", [7, 13, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainting_by_a_sampler_ends_at_the_image(name, steps):
    table = fused.step_table(scheduler_of(name, timestep_spacing="trailing"), steps)
    image, mask = torch.randn(1, 4, 8, 8), torch.zeros(1)
    got = fastguide.Sampler(lambda x, t: 0.1 * x, table)(torch.randn(1, 4, 8, 8), image=image, mask=mask, seeds=[1])
    assert torch.equal(got, image)
