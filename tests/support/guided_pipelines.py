"""Pipelines of diffusers whose guidance is more than a sum, or is in another space, with a stand-in for their model.

The pipelines' own code runs; the model is a function of a few operations, so that a run takes milliseconds.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

from tests.support.family_pipelines import named
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import nothing


class Part(torch.nn.Module):
    """A part of a pipeline that only has attributes, such as an autoencoder that is not called."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config=None, **attributes):
        super().__init__()
        self.config = SimpleNamespace(**config or {})
        for name, value in attributes.items():
            setattr(self, name, value)


class StandIn(Part):
    """A denoiser: ``shift`` of its input's first channels, its condition, its timestep and options."""

    def __init__(self, channels, dim=1, **config):
        super().__init__({"in_channels": channels, **config})
        self.channels, self.dim = channels, dim
        self.rope = SimpleNamespace(prepare_video_coords=lambda batch, *_, **__: torch.zeros(batch, 3, 1, 2))
        self.audio_rope = SimpleNamespace(prepare_audio_coords=lambda batch, *_: torch.zeros(batch, 1))

    def cache_context(self, name):
        return contextlib.nullcontext()

    def shift(self, x, encoder_hidden_states, timestep, more=0.0):
        """Make a prediction that no other of the batch has to do with."""
        shape = (-1, *[1] * (x.dim() - 1))
        condition = encoder_hidden_states.flatten(1).mean(1).view(shape)
        waves = torch.linspace(0, 3, x[0].numel()).view(x.shape[1:])
        return 0.4 * torch.tanh(x + 3.0 * condition * waves.sin() + more) + 0.1 * waves.cos() * timestep.view(shape)

    def forward(self, hidden_states, timestep, encoder_hidden_states, audio_hidden_states=None, **how):
        x = hidden_states.narrow(self.dim, 0, self.channels)
        t = timestep.float().flatten()[: len(x)] / 1000
        more = 0.3 * (how.get("spatio_temporal_guidance_blocks") is not None) - 0.2 * bool(
            how.get("isolate_modalities")
        )
        made = self.shift(x, encoder_hidden_states, t, more)
        if audio_hidden_states is None:
            return (made,)
        return made, self.shift(audio_hidden_states, how["audio_encoder_hidden_states"], t, more)


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _prompts(suffixes=("",), mask="mask"):
    given = {}
    for suffix in suffixes:
        for sign in ("", "negative_"):
            given |= named(f"{sign}prompt_embeds{suffix}", (5, 8))
            name = f"{sign}prompt_embeds_{mask}{suffix}" if mask == "mask" else f"{sign}prompt_{mask}"
            given[name] = torch.ones(1, 5)
            given[f"{sign}prompt_embeds{suffix}"] = given[f"{sign}prompt_embeds{suffix}"] + (0.5 if sign else 0.0)
    return given


def hunyuan_image(**config):
    """Make HunyuanImage 2.1, guided by projection with momentum after two plain steps."""
    guider = diffusers.AdaptiveProjectedMixGuidance(
        guidance_scale=3.5, adaptive_projected_guidance_scale=4.0, adaptive_projected_guidance_rescale=2.0,
        **{"adaptive_projected_guidance_start_step": 1, **config},
    )  # fmt: skip
    transformer = StandIn(4, guidance_embeds=False, use_meanflow=False)
    parts = nothing("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.HunyuanImagePipeline(scheduler=flow(shift=5.0), transformer=transformer, guider=guider, **parts)
    return pipe, {**_prompts(("", "_2")), "height": 128, "width": 128}


def hunyuan_video_15(guider=None):
    transformer = StandIn(32, target_size=640, image_embed_dim=4)
    parts = nothing("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    vae = Part({"latent_channels": 32}, temporal_compression_ratio=4, spatial_compression_ratio=16)
    guider = guider or diffusers.ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=0.7)
    pipe = diffusers.HunyuanVideo15Pipeline(
        scheduler=flow(shift=5.0), transformer=transformer, guider=guider, vae=vae, **parts
    )
    return pipe, {**_prompts(("", "_2")), "height": 32, "width": 32, "num_frames": 5}


def hunyuan_video_15_zero_star():
    return hunyuan_video_15(diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=6.0, zero_init_steps=0))


def longcat_image():
    """Make LongCat-Image, which limits the norm of each token."""
    transformer = StandIn(64, dim=2)
    vae = Part({"block_out_channels": (8, 8, 8, 8)})
    parts = nothing("text_encoder", "tokenizer", "text_processor")
    pipe = diffusers.LongCatImagePipeline(scheduler=flow(), transformer=transformer, vae=vae, **parts)
    prompts = _prompts()
    pipe._encode_prompt = lambda prompt: prompts["prompt_embeds" if prompt[0] else "negative_prompt_embeds"]
    given = {"prompt": "a picture", "height": 64, "width": 64, "guidance_scale": 4.5, "cfg_renorm_min": 0.3}
    return pipe, {**given, "enable_prompt_rewrite": False}


def motif_video():
    guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=8.0, adaptive_projected_guidance_rescale=2.0, eta=0.2)
    transformer = StandIn(16, patch_size=2, patch_size_t=1)
    vae = Part({"z_dim": 16, "scale_factor_temporal": 4, "scale_factor_spatial": 8})
    pipe = diffusers.MotifVideoPipeline(
        scheduler=flow(), transformer=transformer, guider=guider, vae=vae, **nothing("text_encoder", "tokenizer")
    )
    given = _prompts(mask="attention_mask")
    return pipe, {**given, "height": 32, "width": 32, "num_frames": 5}


def ltx_2(kind="LTX2Pipeline", **also):
    """Make LTX-2, which rescales in the space of originals; ``also``: further predictions."""
    transformer = StandIn(8, dim=2, patch_size=1, patch_size_t=1)
    parts = nothing("text_encoder", "tokenizer", "vocoder")
    latents = {"latents_mean": torch.zeros(1), "latents_std": torch.ones(1)}
    vae = Part({"scaling_factor": 1.0}, spatial_compression_ratio=32, temporal_compression_ratio=8, **latents)
    config = {"mel_bins": 16, "latent_channels": 8, "sample_rate": 16000, "mel_hop_length": 160}
    audio = Part(config, mel_compression_ratio=4, temporal_compression_ratio=4, **latents)
    connectors = Part(forward=lambda embeds, mask, padding_side: (embeds, embeds, mask))
    pipe = getattr(diffusers, kind)(
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05), transformer=transformer,
        connectors=connectors, vae=vae, audio_vae=audio, **parts,
    )  # fmt: skip
    given = _prompts(mask="attention_mask")
    plain = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    return pipe, {
        **given, "height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0, "guidance_rescale": 0.7, **plain,
        **also,
    }  # fmt: skip


def ltx_2_of_four():
    """Make LTX-2 with its four predictions, which are more terms than the kernels take beside the sample."""
    scales = {"stg_scale": 1.0, "modality_scale": 3.0, "audio_stg_scale": 1.0, "audio_modality_scale": 3.0}
    return ltx_2(**scales, spatio_temporal_guidance_blocks=[0])


def cosmos_2():
    """Make Cosmos-Predict2, which guides originals."""
    pipe = diffusers.Cosmos2TextToImagePipeline(
        transformer=StandIn(4), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Part(), **nothing("text_encoder", "tokenizer", "vae"),
    )  # fmt: skip
    given = named("prompt_embeds negative_prompt_embeds", (5, 8), (5, 8))
    return pipe, {**given, "height": 64, "width": 64, "guidance_scale": 7.0}
