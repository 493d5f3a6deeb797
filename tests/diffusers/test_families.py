"""One small pipeline of each of diffusers' families: the same results, and each step fused as far as it can be.

Where a step is not fused with guidance, a comment says what the pipeline does with the predictions, or what is not
traced.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import family_pipelines as unets
from tests.support import family_transformers as transformers
from tests.support import guided_pipelines as guided
from tests.support import guided_sound as sound
from tests.support import joint_pipelines as joint
from tests.support import rare_pipelines as rare
from tests.support import transformer_pipelines
from tests.support.family_pipelines import result
from tests.support.scheduler_pair import diffusers, fused

pytest.importorskip("transformers")  # without it, diffusers has hardly any pipelines

GUIDED, ALONE = "fused with guidance", "fused without guidance"
HANDED_OVER = "left to diffusers: a history that was read, and may have been changed"
STEPS = 4, 3
FAMILIES = {  # how it is made, and what the steps of two calls are, one of four steps and one of three
    "FLUX": (transformers.flux_embedded, {ALONE: 7}),  # its scale is an input of the model
    "FLUX, true guidance": (transformers.flux_guided, {GUIDED: 7}),
    "FLUX, from an image": (transformers.flux_from_image, {GUIDED: 6}),
    "FLUX, inpainting": (transformers.flux_inpainting, {GUIDED: 6}),
    "Stable Diffusion 3": (transformers.smaller_stable_diffusion_3, {GUIDED: 7}),
    "Stable Diffusion 3, from an image": (transformers.stable_diffusion_3_from_image, {GUIDED: 6}),
    "Stable Diffusion 3, a layer less": (transformers.stable_diffusion_3_skipping_layers, {GUIDED: 7}),
    "Stable Diffusion, inpainting": (unets.inpainting, {GUIDED: 5}),
    "Stable Diffusion, steps in parallel": (unets.in_parallel, {GUIDED: 7}),
    "SDXL": (unets.stable_diffusion_xl, {GUIDED: 7}),
    "SDXL, rescaled": (unets.stable_diffusion_xl_rescaled, {GUIDED: 7}),
    "SDXL, from an image": (unets.stable_diffusion_xl_from_image, {GUIDED: 5}),
    "SDXL, inpainting": (unets.stable_diffusion_xl_inpainting, {GUIDED: 5}),
    "SDXL, a model of inpainting": (unets.stable_diffusion_xl_inpainting_model, {GUIDED: 5}),
    "Wan 2.1": (transformer_pipelines.wan, {GUIDED: 7}),
    "Wan 2.2": (transformers.wan_of_two_models, {GUIDED: 7}),
    "Qwen-Image": (transformers.qwen_image, {GUIDED: 7}),  # with the norm of each token
    "LTX": (transformers.ltx, {GUIDED: 7}),
    "LTX, from an image": (transformers.ltx_from_image, {GUIDED: 7}),
    "LTX, a timestep for each token": (transformers.ltx_with_conditions, {GUIDED: 7}),
    "LTX, with a frame": (transformers.ltx_with_a_frame, {GUIDED: 7}),
    "LTX-2, not rescaled": (transformers.ltx_2_not_rescaled, {GUIDED: 14}),
    "LTX-2, HDR": (transformers.ltx_2_hdr, {GUIDED: 7, ALONE: 7}),
    "Sana": (transformers.sana, {GUIDED: 7}),
    "Sana-Sprint": (transformers.sana_sprint, {ALONE: 7}),  # its scale is an input of the model
    "PixArt-alpha": (transformers.pixart_alpha, {GUIDED: 7}),
    "PixArt-Sigma": (transformers.pixart_sigma, {GUIDED: 7}),
    "PixArt-Sigma, perturbed attention": (transformers.pixart_sigma_perturbed, {GUIDED: 7}),
    "ChronoEdit": (transformers.chrono_edit, {GUIDED: 7}),
    "ChronoEdit, with reasoning": (transformers.chrono_edit_with_reasoning, {GUIDED: 4, HANDED_OVER: 3}),
    "AnyFlow": (transformers.any_flow, {GUIDED: 7}),
    "Helios": (transformers.helios, {GUIDED: 14}),
    "HunyuanVideo": (transformers.hunyuan_video, {ALONE: 7}),  # its scale is an input of the model
    "HunyuanVideo, true guidance": (transformers.hunyuan_video_guided, {GUIDED: 7}),
    "CogVideoX-2b": (transformers.cogvideox_ddim, {GUIDED: 7}),
    "CogVideoX-5b": (transformers.cogvideox_dpm, {GUIDED: 7}),
    "Z-Image": (transformers.z_image, {GUIDED: 7}),
    "Z-Image, normalized": (transformers.z_image_normalized, {ALONE: 7}),  # norms decide, of a small image
    "Z-Image, two images, truncated": (transformers.z_images_truncated, {GUIDED: 5, ALONE: 2}),  # one by one
    "Lumina": (transformers.lumina, {GUIDED: 7}),
    "DiT": (transformers.class_conditional, {GUIDED: 7}),
    "DiT, two pictures": (transformers.class_conditional_pair, {GUIDED: 7}),
    "Lumina 2": (transformers.lumina_2, {GUIDED: 7}),  # with the norm of each row
    "Lumina 2, not normalized": (transformers.lumina_2_without_normalization, {GUIDED: 7}),
    "Lumina 2, truncated": (transformers.lumina_2_truncated, {GUIDED: 3, ALONE: 4}),  # steps without guidance
    "AuraFlow": (transformers.aura_flow, {GUIDED: 7}),
    "PRX, of pixels": (transformers.prx_pixels, {GUIDED: 7}),
    "Stable Diffusion, latent upscaler": (unets.latent_upscaler, {GUIDED: 7}),
    "Kandinsky 2.2, prior": (unets.kandinsky_prior, {GUIDED: 7}),
    "Kandinsky 2.2, decoder": (unets.kandinsky_decoder, {GUIDED: 7}),
    "Kandinsky 2.2, decoder with DDIM": (unets.kandinsky_decoder_without_variance, {GUIDED: 7}),
    "Kandinsky 2.2": (unets.kandinsky, {GUIDED: 13}),
    "LCM": (unets.latent_consistency, {ALONE: 7}),  # its scale is an input of the model
    "Stable Cascade, prior": (unets.cascade_prior, {GUIDED: 7}),
    "Stable Cascade, decoder": (unets.cascade_decoder, {GUIDED: 7}),
    "consistency model": (unets.consistency_model, {ALONE: 7}),  # guides nothing
    "InstructPix2Pix": (unets.instruct_pix2pix, {GUIDED: 7}),
    "Stable Diffusion, perturbed attention": (unets.perturbed_attention, {GUIDED: 7}),
    "Stable Diffusion, perturbed attention that fades": (unets.perturbed_attention_that_fades, {GUIDED: 7}),
    "DeepFloyd IF": (unets.deepfloyd_if, {GUIDED: 7}),
    "DeepFloyd IF, DPM-Solver": (unets.deepfloyd_if_with_dpm_solver, {GUIDED: 7}),  # which drops the variance
    "DeepFloyd IF, upscaling": (unets.deepfloyd_if_upscaling, {GUIDED: 7}),
    "Kandinsky 6, distilled": (rare.kandinsky_6, {ALONE: 7}),  # is not guided
    "Kandinsky 6, distilled, with sound": (rare.kandinsky_6_with_sound, {ALONE: 14}),
    "Kandinsky 6, guided": (rare.kandinsky_6_guided, {GUIDED: 14}),  # grids of velocities
}
FAMILIES |= {  # with a stand-in for the model
    "ACE-Step": (sound.ace_step, {GUIDED: 7}),  # projected in each channel, with momentum
    "ACE-Step, guided in an interval": (sound.ace_step_in_an_interval, {GUIDED: 5, ALONE: 2}),
    "HunyuanImage": (guided.hunyuan_image, {GUIDED: 7}),  # projected, with momentum
    "HunyuanVideo 1.5": (guided.hunyuan_video_15, {GUIDED: 7}),  # rescaled, by diffusers' guider
    "HunyuanVideo 1.5, Zero*": (guided.hunyuan_video_15_zero_star, {GUIDED: 7}),
    "LongCat-Image": (guided.longcat_image, {GUIDED: 7}),  # with the norm of each token, in bounds
    "Motif-Video": (guided.motif_video, {GUIDED: 7}),  # projected
    "UniDiffuser": (joint.uni_diffuser, {GUIDED: 7}),  # joins what its model returns
    "UniDiffuser, of a text": (joint.uni_diffuser_of_a_text, {GUIDED: 7}),
    "LTX-2": (guided.ltx_2, {GUIDED: 14}),  # rescaled in x_0, of pictures and sound
    "LTX-2, four predictions": (guided.ltx_2_of_four, {GUIDED: 14}),
    "Cosmos 1": (rare.cosmos, {ALONE: 7, GUIDED: 7}),  # has its scheduler make x_0, and guides that
    "Cosmos 1, not guided": (rare.cosmos_not_guided, {ALONE: 14}),
    "Cosmos 2": (guided.cosmos_2, {GUIDED: 7}),  # guides x_0
}
SOUND = ["Stable Audio"] if fused.served.HAS_TORCHSDE else []
FAMILIES |= {name: (transformers.stable_audio, {GUIDED: 7}) for name in SOUND}
SCALES = "guidance_scale", "true_cfg_scale", "image_guidance_scale", "guidance_scale_2", "pag_scale"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Run on one thread: models as small as these wait for a second one longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(name):
    return FAMILIES[name][0]()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def schedulers_of(pipe):
    """Return the class names of a pipeline's schedulers, by theirs."""
    return {name: type(p).__name__ for name, p in pipe.components.items() if isinstance(p, diffusers.SchedulerMixin)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_makes_the_same(name):
    pipe, given = made(name)
    before = {steps: result(pipe, given, steps) for steps in STEPS}
    exchanged = schedulers_of(pipe)
    done = fused.accelerate(pipe)
    assert done.exchanged == exchanged
    assert not done.left_alone
    for steps in STEPS:
        close(result(pipe, given, steps), before[steps])
    assert done.counts == FAMILIES[name][1]
    fused.restore(pipe)
    for steps in STEPS:
        assert torch.equal(result(pipe, given, steps), before[steps])
    assert done.counts == FAMILIES[name][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_inference_mode_makes_the_same(name):
    pipe, given = made(name)
    before = {steps: result(pipe, given, steps) for steps in STEPS}
    done = fused.accelerate(pipe)
    with torch.inference_mode():
        for steps in STEPS:
            close(result(pipe, given, steps), before[steps])
    assert done.counts == FAMILIES[name][1]


WITHOUT_A_SCALE = {"consistency model", "HunyuanImage", "HunyuanVideo 1.5", "HunyuanVideo 1.5, Zero*", "Motif-Video"}
"""In the call: their guiders have it."""
WITHOUT_A_SCALE |= {name for name in FAMILIES if "distilled" in name or name.endswith("not guided")}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - WITHOUT_A_SCALE))
def test_each_scale_of_guidance_matters(name):
    """So that the tests above would see a wrong one: a hundred times their tolerance."""
    pipe, given = made(name)
    before, scales = result(pipe, given), set(SCALES) & set(given)
    assert scales
    for scale in scales:
        assert (result(pipe, {**given, scale: given[scale] * 1.5}) - before).abs().max() > 0.02, scale


def test_dynamic_thresholding_is_part_of_the_step():
    """DeepFloyd IF's first model is published with it."""
    pipe, given = unets.deepfloyd_if_with_thresholding()
    before = result(pipe, given)
    done = fused.accelerate(pipe)
    assert not done.left_alone
    close(result(pipe, given), before)
    assert set(done.counts) == {GUIDED}
    pipe.scheduler.register_to_config(thresholding=False)
    assert (result(pipe, given) - before).abs().max() > 0.02


# ---- Callbacks ----

EDITED = {
    "FLUX, true guidance": {GUIDED: 4},
    "SDXL": {GUIDED: 4},
    "SDXL, inpainting": {GUIDED: 3},
    "Wan 2.1": {GUIDED: 4},
    "Cosmos 1": {ALONE: 4, GUIDED: 4},
    "Sana": {GUIDED: 4},
    "Sana-Sprint": {ALONE: 4},
    "CogVideoX-2b": {GUIDED: 4},
    "CogVideoX-5b": {GUIDED: 4},
    "Z-Image": {GUIDED: 4},
    "Kandinsky 2.2, prior": {GUIDED: 4},
    "Kandinsky 2.2, decoder": {GUIDED: 4},
    "LCM": {ALONE: 4},
    "Stable Cascade, prior": {GUIDED: 4},
}


@pytest.mark.parametrize("name", EDITED)
def test_a_callback_puts_other_latents_in_their_place(name):
    pipe, given = made(name)

    def edit(pipe, step, timestep, values):
        return {"latents": values["latents"] * 0.5 + 0.5} if step == 1 else values

    unedited, before = result(pipe, given), result(pipe, given, callback_on_step_end=edit)
    assert (unedited - before).abs().max() > 0.02
    done = fused.accelerate(pipe)
    close(result(pipe, given, callback_on_step_end=edit), before)
    assert done.counts == EDITED[name]


@pytest.mark.parametrize(
    "name", ["FLUX, true guidance", "SDXL", "CogVideoX-2b", "CogVideoX-5b", "Kandinsky 2.2, decoder"]
)
def test_a_callback_writes_into_the_latents(name):
    """Solvers that go back to the sample before see what has become of it: they are not among these."""
    pipe, given = made(name)

    def edit(pipe, step, timestep, values):
        if step == 1:
            values["latents"].mul_(0.9).add_(0.1)
        return values

    before = result(pipe, given, callback_on_step_end=edit)
    fused.accelerate(pipe)
    close(result(pipe, given, callback_on_step_end=edit), before)


@pytest.mark.parametrize("name", ["PixArt-alpha", "consistency model", "DeepFloyd IF", *SOUND])
def test_a_callback_of_the_older_kind_sees_the_latents(name):
    pipe, given = made(name)

    def run():
        seen = []
        result(pipe, given, callback=lambda step, timestep, latents: seen.append(latents.clone()))
        return torch.stack(seen)

    before = run()
    fused.accelerate(pipe)
    close(run(), before)


def test_guidance_is_cut_off_in_the_middle():
    """diffusers' own callback sets the scale to 0, and keeps one half of the embeddings."""
    pipe, given = made("SDXL")
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    cutoff = diffusers.callbacks.SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    before = result(pipe, given, callback_on_step_end=cutoff)
    done = fused.accelerate(pipe)
    close(result(pipe, given, callback_on_step_end=cutoff), before)
    assert done.counts == {GUIDED: 3, ALONE: 1}


def test_a_refiner_goes_on_where_the_base_ends():
    base, given = made("SDXL")
    refiner, others = made("SDXL, from an image")

    def run():
        half = result(base, given, denoising_end=0.5)
        return half, result(refiner, {**others, "image": half}, denoising_start=0.5)

    before = run()
    done = [fused.accelerate(pipe) for pipe in (base, refiner)]
    for ours, theirs in zip(run(), before, strict=True):
        close(ours, theirs)
    assert [each.counts for each in done] == [{GUIDED: 2}, {GUIDED: 2}]


# ---- Saving and copying ----

SAVED = ["SDXL", "FLUX", "Sana", "CogVideoX-5b", "Kandinsky 2.2, decoder", "DeepFloyd IF, upscaling", *SOUND]


@pytest.mark.parametrize("name", SAVED)
def test_an_accelerated_pipeline_is_saved_as_diffusers_own(name, tmp_path):
    pipe, given = made(name)
    before, types = result(pipe, given), {name: type(part) for name, part in pipe.components.items()}
    fused.accelerate(pipe)
    close(result(pipe, given), before)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, **{name: None for name, kind in types.items() if kind is type(None)})
    assert {name: type(part) for name, part in loaded.components.items()} == types
    close(result(loaded, given), before)
    assert fused.accelerate(loaded).exchanged == schedulers_of(pipe)
    close(result(loaded, given), before)


@pytest.mark.parametrize("name", ["SDXL", "Wan 2.1", "CogVideoX-5b", "Kandinsky 2.2", "Sana", "InstructPix2Pix"])
def test_a_deep_copy_goes_its_own_way(name):
    pipe, given = made(name)
    before = result(pipe, given)
    done = fused.accelerate(pipe)
    close(result(pipe, given), before)
    copied, counts = copy.deepcopy(pipe), dict(done.counts)
    close(result(copied, given), before)
    assert done.counts == counts
    assert fused.accelerate(copied).counts == counts
    fused.restore(copied)
    assert torch.equal(result(copied, given), before)
    close(result(pipe, given), before)
    assert done.counts == {kind: 2 * count for kind, count in counts.items()}
    fused.restore(pipe)
    assert torch.equal(result(pipe, given), before)


def test_a_pipeline_of_the_parts_of_an_accelerated_one():
    """It has the fused scheduler from the beginning; its guidance is fused when it is accelerated itself."""
    first, given = made("SDXL")
    others = made("SDXL, from an image")[1]
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(first)
    before = result(first, given), result(second, others)
    done = fused.accelerate(first)
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(first)
    close(result(second, others), before[1])
    assert done.counts == {ALONE: 3}
    assert fused.accelerate(second).counts == {ALONE: 3}
    close(result(second, others), before[1])
    close(result(first, given), before[0])
    assert done.counts == {ALONE: 3, GUIDED: 7}
    fused.restore(second)
    close(result(first, given), before[0])
    assert done.counts == {ALONE: 3, GUIDED: 11}
    fused.restore(first)
    assert torch.equal(result(first, given), before[0])
    assert torch.equal(result(second, others), before[1])
