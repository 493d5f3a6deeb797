"""Pipelines of diffusers that keep a part of a video by a mask around guidance, with stand-ins for their parts."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.support.family_pipelines import named, picture
from tests.support.guided_pipelines import Part, StandIn, ltx_2
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import nothing


class Autoencoder(Part):
    """Stand for an autoencoder: means of pixels, and multiples of them."""

    def __init__(self, channels, size, frames, config=None, **attributes):
        normal = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, "z_dim": channels}
        super().__init__({**normal, "latent_channels": channels, **(config or {})}, **attributes)
        self.sizes, self.factors = (frames, size, size), torch.linspace(-1, 1, channels).view(1, -1, 1, 1, 1)

    def encode(self, video):
        frames = torch.cat([video[:, :, :1].repeat_interleave(self.sizes[0] - 1, 2), video], 2)  # the first is whole
        means = torch.nn.functional.avg_pool3d(frames.mean(1, keepdim=True).float(), self.sizes)
        return SimpleNamespace(latents=3.0 * means * self.factors)

    def decode(self, latents, return_dict=False):
        grown = latents[:, :3].repeat_interleave(self.sizes[0], 2)[:, :, self.sizes[0] - 1 :]
        return (grown.repeat_interleave(self.sizes[1], 3).repeat_interleave(self.sizes[2], 4),)


def _cosmos(kind, scheduler, autoencoder, *, model=None, **parts):
    pipe = getattr(diffusers, kind)(
        transformer=model or StandIn(4, in_channels=5), scheduler=scheduler, vae=autoencoder,
        **{"safety_checker": Part(), **nothing("text_encoder", "tokenizer"), **parts},
    )  # fmt: skip
    given = named("prompt_embeds negative_prompt_embeds", (5, 8), (5, 8))
    return pipe, {**given, "height": 64, "width": 64, "guidance_scale": 3.0}


def _of_wan():
    return Autoencoder(4, 8, 4, temperal_downsample=[False, True, True])


def cosmos_1_from_image():
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0, final_sigmas_type="sigma_min")
    compression = {"temporal_compression_ratio": 8, "spatial_compression_ratio": 8, "latents_mean": None}
    pipe, given = _cosmos("CosmosVideoToWorldPipeline", scheduler, Autoencoder(4, 8, 8, compression))
    return pipe, {**given, "image": picture(64), "num_frames": 17}


def cosmos_2_from_image():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe, given = _cosmos("Cosmos2VideoToWorldPipeline", scheduler, _of_wan())
    return pipe, {**given, "image": picture(64), "num_frames": 9}


def _unipc():
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )


def cosmos_25_from_video():
    pipe, given = _cosmos("Cosmos2_5_PredictBasePipeline", _unipc(), _of_wan())
    video = picture(64)[:, :, None].repeat(1, 1, 5, 1, 1) * 2 - 1
    return pipe, {**given, "video": video, "num_frames": 13}


class _Controls(Part):
    def forward(self, controls_latents, latents, **how):
        return ([controls_latents],)


def cosmos_25_transfer():
    pipe, given = _cosmos("Cosmos2_5_TransferPipeline", _unipc(), _of_wan(), controlnet=_Controls())
    controls = picture(64).repeat(9, 1, 1, 1)
    chunks = {"num_frames_per_chunk": 5, "num_ar_conditional_frames": 1}
    return pipe, {**given, "controls": controls, "num_frames": 9, **chunks}


def _ltx_2(kind, **also):
    pipe, given = ltx_2(kind, **also)
    pipe.vae.encode = Autoencoder(8, 32, 8).encode
    return pipe, given


def ltx_2_from_image():
    return _ltx_2("LTX2ImageToVideoPipeline", image=picture(64), image_crf=0)


def ltx_2_with_conditions():
    """Make LTX-2 that keeps one frame, and follows another by a part."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    frame = picture(64)
    conditions = [
        LTX2VideoCondition(frame, index=0, crf=0), LTX2VideoCondition(1 - frame, index=1, strength=0.8, crf=0)
    ]  # fmt: skip
    return _ltx_2("LTX2ConditionPipeline", conditions=conditions)
