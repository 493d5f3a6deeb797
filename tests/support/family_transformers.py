"""Small pipelines of diffusers' families whose models are transformers, and what they are called with.

``transformer_pipelines`` has Stable Diffusion 3, FLUX and Wan; these are the others, and variants of those. None has a
text encoder, and most have no autoencoder: the pipelines then take latents for an eighth of the picture's size.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.support.family_pipelines import masked_picture, model_of, named, picture, prompts, with_random_weights
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import autoencoder, embeddings, flux, nothing, stable_diffusion_3, wan

MASKS = "prompt_attention_mask", "negative_prompt_attention_mask"


def pipeline_of(kind, transformer, scheduler, **also):
    """Make a pipeline of a transformer, without encoders; its autoencoder is ``also``'s."""
    parts = {"vae": None, **nothing("text_encoder", "tokenizer"), **also}
    if parts.pop("no_vae", False):
        del parts["vae"]
    return getattr(diffusers, kind)(transformer=transformer, scheduler=scheduler, **parts)


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def masks(*names, tokens=5):
    return {name: torch.ones(1, tokens, dtype=torch.long) for name in names or MASKS}


# ---- Variants of those in transformer_pipelines ----


def smaller_stable_diffusion_3():
    pipe, given = stable_diffusion_3()
    return pipe, {**given, "height": 8, "width": 8}


def stable_diffusion_3_skipping_layers():
    """Guide away from the model without one of its layers, too, as Stable Diffusion 3.5 Medium is used."""
    pipe, given = smaller_stable_diffusion_3()
    return pipe, {**given, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.6}


def _from_image(kind, made, **also):
    pipe, given = made
    with_random_weights(pipe.vae).register_to_config(shift_factor=0.1)
    return getattr(diffusers, kind)(**pipe.components), {**given, **also}


def stable_diffusion_3_from_image():
    made = smaller_stable_diffusion_3()
    return _from_image("StableDiffusion3Img2ImgPipeline", made, image=picture(8), strength=0.75)


def flux_from_image():
    return _from_image("FluxImg2ImgPipeline", flux(guided=True), image=picture(), height=16, width=16, strength=0.75)


def flux_inpainting():
    return _from_image("FluxInpaintPipeline", flux(guided=True), **masked_picture(), strength=0.75)


def flux_embedded():
    pipe, given = flux()
    return pipe, {**given, "guidance_scale": 3.5}


def flux_guided():
    return flux(guided=True)


def wan_of_two_models():
    """Make Wan 2.2: its second transformer takes over at the lower noise levels."""
    pipe, given = wan()
    other = with_random_weights(diffusers.WanTransformer3DModel(**pipe.transformer.config))
    pipe = diffusers.WanPipeline(**{**pipe.components, "transformer_2": other}, boundary_ratio=0.875)
    return pipe, {**given, "guidance_scale_2": 3.0}


# ---- Images ----


def qwen_image():
    transformer = model_of(
        "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    pipe = pipeline_of("QwenImagePipeline", transformer, scheduler)
    given = {**prompts(), **masks("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    return pipe, {**given, "height": 32, "width": 32, "true_cfg_scale": 4.0}


def _sana_transformer(**config):
    return model_of(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, sample_size=32, **config,
    )  # fmt: skip


def sana():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe = pipeline_of("SanaPipeline", _sana_transformer(), scheduler)
    given = {**prompts(), **masks(), "negative_prompt": None}
    return pipe, {**given, "height": 128, "width": 128, "guidance_scale": 4.5, "use_resolution_binning": False}


def sana_sprint():
    transformer = _sana_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    pipe = pipeline_of("SanaSprintPipeline", transformer, diffusers.SCMScheduler())
    given = {**named("prompt_embeds", (5, 8)), **masks("prompt_attention_mask"), "intermediate_timesteps": None}
    return pipe, {**given, "guidance_scale": 4.5, "height": 128, "width": 128, "use_resolution_binning": False}


def _pixart(kind, scheduler, **also):
    transformer = model_of(
        "PixArtTransformer2DModel", in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8, norm_num_groups=4,
    )  # fmt: skip
    pipe = pipeline_of(kind, transformer, scheduler, **also)
    given = {**prompts(), **masks(), "negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**given, "height": 64, "width": 64, "guidance_scale": 4.5}


def pixart_alpha():
    return _pixart("PixArtAlphaPipeline", diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.002))


def pixart_sigma():
    return _pixart("PixArtSigmaPipeline", diffusers.EulerDiscreteScheduler(beta_schedule="linear", beta_end=0.002))


def pixart_sigma_perturbed():
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.002)
    pipe, given = _pixart("PixArtSigmaPAGPipeline", scheduler, pag_applied_layers=["blocks.0"])
    return pipe, {**given, "pag_scale": 2.0}


def z_image(normalization=False, images=1, **call):
    """Make Z-Image: its model returns a list, of one prediction for each image."""
    transformer = model_of(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=8, axes_dims=[8, 4, 4], axes_lens=[64, 16, 16],
    )  # fmt: skip
    pipe = pipeline_of("ZImagePipeline", transformer, flow(shift=3.0))
    prompts = [one[0] for one in embeddings(*[(5, 8)] * (2 * images))]
    given = {"prompt_embeds": prompts[:images], "negative_prompt_embeds": prompts[images:]}
    call = {"guidance_scale": 5.0, "cfg_normalization": normalization, **call}
    return pipe, {**given, "height": 32, "width": 32, **call}


def z_image_normalized():
    return z_image(normalization=True)


def z_images_truncated():
    """Make Z-Image that guides the first steps alone."""
    return z_image(images=2, cfg_truncation=0.3)


def lumina():
    transformer = model_of(
        "LuminaNextDiT2DModel", sample_size=4, in_channels=4, hidden_size=8, num_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, cross_attention_dim=8,
    )  # fmt: skip
    pipe = pipeline_of("LuminaPipeline", transformer, flow())
    given = {**prompts(), **masks()}
    return pipe, {**given, "height": 32, "width": 32, "guidance_scale": 4.0}


def class_conditional(labels=(3,)):
    """Make DiT, whose samples are there twice, each half with the same guidance."""
    transformer = model_of(
        "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8,
        num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, autoencoder(4), diffusers.DPMSolverMultistepScheduler())
    return pipe, {"class_labels": list(labels), "guidance_scale": 4.0, "output_type": "pt"}


def class_conditional_pair():
    return class_conditional((3, 5))


def lumina_2(**also):
    transformer = model_of(
        "Lumina2Transformer2DModel", sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16),
        cap_feat_dim=8,
    )  # fmt: skip
    pipe = pipeline_of("Lumina2Pipeline", transformer, flow(shift=6.0))
    given = {**prompts(), **masks()}
    return pipe, {**given, "height": 32, "width": 32, "guidance_scale": 4.0, **also}


def lumina_2_without_normalization():
    return lumina_2(cfg_normalization=False)


def lumina_2_truncated():
    """Guide the first half of the steps only."""
    return lumina_2(cfg_normalization=False, cfg_trunc_ratio=0.5)


def prx_pixels():
    """Make PRX for pixels, whose model predicts x_0: the pipeline converts that to a velocity."""
    transformer = model_of(
        "PRXTransformer2DModel", in_channels=3, patch_size=2, context_in_dim=8, hidden_size=16, num_heads=2, depth=1,
        axes_dim=[4, 4],
    )  # fmt: skip
    pipe = pipeline_of("PRXPixelPipeline", transformer, flow(shift=3.0), no_vae=True)
    masks_of_text = {name: torch.ones(1, 5, dtype=torch.bool) for name in MASKS}
    given = {**prompts(), **masks_of_text, "use_resolution_binning": False, "output_type": "pt"}
    return pipe, {**given, "height": 16, "width": 16, "guidance_scale": 4.0}


def aura_flow():
    transformer = model_of(
        "AuraFlowTransformer2DModel", sample_size=4, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    pipe = pipeline_of("AuraFlowPipeline", transformer, flow(shift=1.73))
    given = {**prompts(), **masks()}
    return pipe, {**given, "height": 32, "width": 32, "guidance_scale": 3.5}


# ---- Videos ----


def ltx():
    transformer = model_of(
        "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=8,
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    pipe = pipeline_of("LTXPipeline", transformer, scheduler)
    given = {**prompts(), **masks()}
    return pipe, {**given, "height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0}


def _ltx_with_autoencoder(kind, scheduler=None):
    pipe, given = ltx()
    widths = {"block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4, "layers_per_block": (1,) * 5}
    scaling = dict.fromkeys(("spatio_temporal_scaling", "decoder_spatio_temporal_scaling"), (True, True, False, False))
    vae = model_of(
        "AutoencoderKLLTXVideo", latent_channels=8, decoder_layers_per_block=(1,) * 5, patch_size=1, **widths, **scaling
    )
    parts = {**pipe.components, "vae": vae, "scheduler": scheduler or pipe.scheduler}
    return getattr(diffusers, kind)(**parts), {**given, "height": 32, "width": 32, "num_frames": 5}


def ltx_from_image():
    """Make LTX with a first frame that is given: the step is that of the others."""
    pipe, given = _ltx_with_autoencoder("LTXImageToVideoPipeline")
    return pipe, {**given, "image": picture(32)}


def ltx_with_conditions(**conditions):
    """Make LTX with a timestep for each token, all the same where no frames are given."""
    pipe, given = _ltx_with_autoencoder("LTXConditionPipeline", flow())
    return pipe, {**given, **conditions}


def ltx_with_a_frame():
    """Make it with a first frame that is given, and nearly kept: its tokens are told earlier timesteps."""
    return ltx_with_conditions(image=picture(32), strength=0.7)


def ltx_2(kind="LTX2Pipeline", **also):
    """Make LTX-2, which guides in x_0 and makes sound as well: the same without rescaling."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    rope = {"rope_double_precision": False, "rope_type": "split"}
    transformer = model_of(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1, caption_channels=16, **rope,
    )  # fmt: skip
    vae = model_of(
        "AutoencoderKLLTX2Video", latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), patch_size=1,
    )  # fmt: skip
    audio_vae = model_of(
        "AutoencoderKLLTX2Audio", base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = with_random_weights(
        LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=1, connector_rope_base_seq_len=32, **rope,
            **{f"{of}_connector_{name}": size for of in ("video", "audio") for name, size in sizes.items()},
        )
    )  # fmt: skip
    parts = {"vae": vae, "audio_vae": audio_vae, "connectors": connectors, "vocoder": None}
    pipe = pipeline_of(kind, transformer, flow(), **parts)
    given = {**named("prompt_embeds negative_prompt_embeds", (5, 16), (5, 16)), **masks()}
    plain = {"guidance_scale": 4.0, "guidance_rescale": 0.0, "stg_scale": 0.0}
    return pipe, {**given, **plain, "height": 32, "width": 32, "num_frames": 5, **also}


def ltx_2_not_rescaled():
    return ltx_2(modality_scale=1.0, audio_guidance_rescale=0.0, audio_stg_scale=0.0, audio_modality_scale=1.0)


def ltx_2_hdr():
    return ltx_2("LTX2HDRPipeline")


_SMALL_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip


class Images(torch.nn.Module):
    """Stand for what prepares images for their encoder, and for that: three vectors of each image."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, images=None, return_tensors="pt", **prepared):
        if images is not None:
            from transformers import BatchFeature

            return BatchFeature({"pixel_values": images})
        means = prepared["pixel_values"].flatten(2).mean(-1)
        return SimpleNamespace(hidden_states=[means[..., None] * torch.linspace(-1, 1, 8), None])


def chrono_edit(**also):
    """Make ChronoEdit, a Wan model that is given a first frame."""
    pipe, given = wan()
    sizes = {**_SMALL_WAN, "in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24, "rope_max_seq_len": 32}
    transformer = model_of("ChronoEditTransformer3DModel", **sizes, qk_norm="rms_norm_across_heads")
    parts = {"vae": pipe.vae, "image_encoder": Images(), "image_processor": Images()}
    pipe = pipeline_of("ChronoEditPipeline", transformer, pipe.scheduler, **parts)
    return pipe, {**given, "image": picture(16), **also}


def chrono_edit_with_reasoning():
    """Make it with frames that it drops after two steps: it cuts them out of the scheduler's history as well."""
    return chrono_edit(enable_temporal_reasoning=True, num_temporal_reasoning_steps=2, num_frames=9)


def any_flow():
    """Make AnyFlow, whose model is told where each step leads."""
    pipe, given = wan()
    transformer = model_of("AnyFlowTransformer3DModel", **_SMALL_WAN, rope_max_seq_len=32)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    pipe = pipeline_of("AnyFlowPipeline", transformer, scheduler, vae=pipe.vae)
    return pipe, {**given, "guidance_scale": 4.0}


def helios():
    """Make Helios: two chunks of a video, each a loop of its own."""
    pipe, given = wan()
    transformer = model_of("HeliosTransformer3DModel", **_SMALL_WAN, rope_dim=(4, 4, 4), guidance_cross_attn=False)
    scheduler = diffusers.HeliosScheduler(stages=1, use_dynamic_shifting=True)
    pipe = pipeline_of("HeliosPipeline", transformer, scheduler, vae=pipe.vae)
    return pipe, {**given, "height": 64, "width": 64, "num_frames": 9, "num_latent_frames_per_chunk": 2}


def hunyuan_video(*, guided=False):
    transformer = model_of(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(2, 2, 4),
    )  # fmt: skip
    pipe = pipeline_of("HunyuanVideoPipeline", transformer, flow(shift=7.0), **nothing("text_encoder_2", "tokenizer_2"))
    given = {
        **prompts(), **named("pooled_prompt_embeds negative_pooled_prompt_embeds", (8,), (8,)),
        **masks(),
    }  # fmt: skip
    if not guided:
        given = {name: values for name, values in given.items() if not name.startswith("negative")}
    scale = {"true_cfg_scale": 3.0} if guided else {"guidance_scale": 6.0}
    return pipe, {**given, **scale, "height": 16, "width": 16, "num_frames": 5}


def hunyuan_video_guided():
    return hunyuan_video(guided=True)


def _cogvideox(scheduler, **also):
    transformer = model_of(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=4, text_embed_dim=8, num_layers=1, sample_width=2, sample_height=2, sample_frames=5,
        max_text_seq_length=5,
    )  # fmt: skip
    pipe = pipeline_of("CogVideoXPipeline", transformer, scheduler)
    given = {**prompts(), "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 6.0}
    return pipe, {**given, **also}


_COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def cogvideox_ddim():
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **_COGVIDEOX, snr_shift_scale=3.0, clip_sample=False, set_alpha_to_one=True
    )
    return _cogvideox(scheduler)


def cogvideox_dpm():
    """Make CogVideoX-5b, whose scheduler is called with two timesteps, and with a scale for each step."""
    scheduler = diffusers.CogVideoXDPMScheduler(
        **_COGVIDEOX, snr_shift_scale=1.0, clip_sample=False, set_alpha_to_one=True
    )
    return _cogvideox(scheduler, use_dynamic_cfg=True)


# ---- Sound ----


def stable_audio():
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    transformer = model_of(
        "StableAudioDiTModel", sample_size=4, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, num_key_value_attention_heads=1, cross_attention_dim=8, cross_attention_input_dim=8,
        time_proj_dim=8, global_states_input_dim=16,
    )  # fmt: skip
    vae = model_of(
        "AutoencoderOobleck", encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=4,
        decoder_input_channels=4, channel_multiples=[1, 2], sampling_rate=4,
    )  # fmt: skip
    torch.manual_seed(0)
    projection = StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32).eval()
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(sigma_schedule="exponential")
    pipe = pipeline_of("StableAudioPipeline", transformer, scheduler, vae=vae, projection_model=projection)
    return pipe, {**prompts(), "guidance_scale": 7.0}
