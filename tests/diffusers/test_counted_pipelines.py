"""Small pipelines of diffusers with schedulers that count their steps: the same images, all steps fused."""

from __future__ import annotations

import pytest
import torch

from tests.support.counted_loops import BETAS
from tests.support.pipelines import FreeModel, prompts, stable_diffusion
from tests.support.scheduler_pair import diffusers, fused
from tests.support.transformer_pipelines import flux, stable_diffusion_3, wan

GUIDED, ALONE = "fused with guidance", "fused without guidance"
CONFIGS = {
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {"timestep_spacing": "trailing"},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "SASolverScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
}


def images(pipe, steps=5, **options):
    return pipe(
        **prompts(), num_inference_steps=steps, guidance_scale=5.0, height=64, width=64, output_type="latent",
        generator=torch.Generator().manual_seed(2), **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_stable_diffusion_makes_the_same_images(name):
    scheduler = getattr(diffusers, name)(**BETAS, **CONFIGS[name])
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)
    before = {steps: images(pipe, steps) for steps in (5, 4)}
    done = fused.accelerate(pipe)
    assert done.exchanged == {"scheduler": name}
    calls = 0
    for steps in (5, 4, 5):
        torch.testing.assert_close(images(pipe, steps), before[steps], rtol=2e-4, atol=2e-4)
        calls += len(pipe.scheduler.timesteps)
    assert done.counts == {GUIDED: calls}
    fused.restore(pipe)
    assert pipe.scheduler is scheduler
    torch.testing.assert_close(images(pipe), before[5], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_image_to_image_begins_in_the_middle(name):
    scheduler = getattr(diffusers, name)(**BETAS, **CONFIGS[name])
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def run():
        return pipe(
            image=image, strength=0.6, **prompts(), num_inference_steps=10, guidance_scale=5.0, output_type="latent",
            generator=torch.Generator().manual_seed(2),
        ).images  # fmt: skip

    before = run()
    done = fused.accelerate(pipe)
    torch.testing.assert_close(run(), before, rtol=2e-4, atol=2e-4)
    assert list(done.counts) == [GUIDED]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_callback_that_edits_the_latents(name):
    """UniPC's and Heun's own go back to the sample that they keep: so do these."""
    scheduler = getattr(diffusers, name)(**BETAS, **CONFIGS[name])
    pipe = stable_diffusion("StableDiffusionPipeline", scheduler)

    def edit(pipe, step, timestep, values):
        return {"latents": values["latents"] * 0.9} if step == 2 else values

    before = images(pipe, callback_on_step_end=edit)
    fused.accelerate(pipe)
    torch.testing.assert_close(images(pipe, callback_on_step_end=edit), before, rtol=2e-4, atol=2e-4)


def test_two_pipelines_share_a_scheduler_and_copies_go_their_own_way():
    import copy

    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    first = stable_diffusion("StableDiffusionPipeline", scheduler)
    second = stable_diffusion("StableDiffusionPipeline", scheduler)
    before = images(first)
    fused.accelerate(first)
    second.scheduler = first.scheduler
    fused.accelerate(second)
    copied = stable_diffusion("StableDiffusionPipeline", copy.deepcopy(first.scheduler))
    for pipe in (first, second, copied, first):
        torch.testing.assert_close(images(pipe), before, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sampler_of_the_pipeline_gives_its_latents(name):
    pipe = stable_diffusion("StableDiffusionPipeline", getattr(diffusers, name)(**BETAS, **CONFIGS[name]))
    if not name.startswith(("EulerAncestral", "KDPM2Ancestral", "SASolver")):  # whose noise is drawn elsewhere
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        expected = pipe(
            **prompts(), latents=latents.clone(), num_inference_steps=6, guidance_scale=5.0, output_type="latent"
        ).images
        sampler = fused.sampler_from_pipeline(pipe, 6, fused_guidance())
        embeds = prompts()
        got = sampler(latents, cond=embeds["prompt_embeds"], uncond=embeds["negative_prompt_embeds"])
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def fused_guidance():
    import fastguide

    return fastguide.ClassifierFree(5.0)


TRANSFORMERS = {  # with what their steps are: Wan and FLUX's true guidance call the model once for each condition
    "Stable Diffusion 3": (stable_diffusion_3, GUIDED),
    "FLUX": (flux, ALONE),
    "FLUX with true guidance": (lambda: flux(guided=True), GUIDED),
    "Wan": (wan, GUIDED),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pipelines_of_transformers_make_the_same_latents(name):
    make, kind = TRANSFORMERS[name]
    pipe, options = make()
    pipe.set_progress_bar_config(disable=True)

    def run(steps):
        generator = torch.Generator().manual_seed(2)
        return pipe(**options, num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False)[
            0
        ]

    before = {steps: run(steps) for steps in (5, 3)}
    done = fused.accelerate(pipe)
    assert not done.left_alone
    for steps in (5, 3):
        torch.testing.assert_close(run(steps), before[steps], rtol=2e-4, atol=2e-4)
    assert done.counts == {kind: 8}
    with torch.inference_mode():
        torch.testing.assert_close(run(5), before[5], rtol=2e-4, atol=2e-4)
    assert done.counts == {kind: 13}
    fused.restore(pipe)
    assert torch.equal(run(5), before[5])


class FramesPipeline(diffusers.DiffusionPipeline):
    """A pipeline of videos whose guidance has a scale for each frame, as Stable Video Diffusion's."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, steps):
        self.scheduler.set_timesteps(steps)
        frames = latents.shape[1]
        scale = torch.linspace(1.0, 3.0, frames).unsqueeze(0).repeat(latents.shape[0], 1)
        scale = scale.view(*scale.shape, 1, 1, 1).to(latents.dtype)
        for t in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            noise_pred_uncond, noise_pred_cond = self.unet(given, t)[0].chunk(2)
            noise_pred = noise_pred_uncond + scale * (noise_pred_cond - noise_pred_uncond)
            latents = self.scheduler.step(noise_pred, t, latents).prev_sample
        return latents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("EulerDiscreteScheduler", GUIDED),
        ("EulerAncestralDiscreteScheduler", GUIDED),
        ("DPMSolverMultistepScheduler", ALONE),  # a history is of samples, and not of frames
        ("DDIMScheduler", ALONE),
    ],
)
def test_a_scale_for_each_frame(name, kind, dtype):
    model = FreeModel(lambda x: torch.tanh(0.7 * x) * torch.linspace(0.5, 1.0, len(x)).view(-1, 1, 1, 1, 1).to(x))
    config = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    pipe = FramesPipeline(model, getattr(diffusers, name)(**config))
    x = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.manual_seed(1)
    before = pipe(x, 4)
    done = fused.accelerate(pipe)
    for _ in range(2):
        torch.manual_seed(1)
        got = pipe(x, 4)
        assert got.dtype == before.dtype
        tolerance = 2e-5 if dtype == torch.float32 else 0.05
        assert (got - before).float().norm() <= tolerance * before.float().norm()
    assert done.counts == {kind: 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_for_each_frame_of_latents_that_lie_otherwise(dtype):
    """Frames that are not one after the other in memory are guided by the pipeline."""
    model = FreeModel(lambda x: torch.tanh(0.7 * x) * torch.linspace(0.5, 1.0, len(x)).view(-1, 1, 1, 1, 1).to(x))
    pipe = FramesPipeline(model, diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"))
    x = torch.randn(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    before = pipe(x, 4)
    done = fused.accelerate(pipe)
    for _ in range(2):
        got = pipe(x, 4)
        tolerance = 2e-5 if dtype == torch.float32 else 0.05
        assert (got - before).float().norm() <= tolerance * before.float().norm()
    assert done.counts == {ALONE: 8}


def test_inputs_of_a_flow_are_not_scaled():
    """Bria's pipeline asks for it of any class but diffusers' own."""
    x = torch.randn(2, 3)
    assert fused.FlowMatchEulerDiscreteScheduler().scale_model_input(x, torch.tensor(1.0)) is x
