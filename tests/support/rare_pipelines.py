"""Small pipelines of diffusers that have a scheduler of their own, which hardly any other pipeline has."""

from __future__ import annotations

import torch

from tests.support.family_pipelines import embeddings, model_of, named, picture
from tests.support.guided_pipelines import Part
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import nothing


def kandinsky_6(with_sound=False):
    """Make Kandinsky 6, distilled: its model predicts three velocities for each of its latents' channels."""
    transformer = model_of(
        "Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=12, in_audio_dim=4, out_audio_dim=12,
        in_text_dim=8, in_text_dim2=8, time_dim=8, model_dim=8, ff_dim=16, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(2, 2, 4), visual_cond=True,
    )  # fmt: skip
    vae = Part({"spatial_compression_ratio": 8, "temporal_compression_ratio": 4})
    audio = Part({"sample_rate": 16000, "scaling_factor": 1.0}, latent_hop_length=1024) if with_sound else None
    pipe = diffusers.Kandinsky6TI2VAPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.PiflowScheduler(n_grid=3), audio_vae=audio,
        vocoder=Part() if with_sound else None, **nothing("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )  # fmt: skip
    given = named("prompt_embeds", (5, 8)) | {"pooled_prompt_embeds": embeddings((8,))[0]}
    sizes = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 8.0}
    return pipe, {**given, **sizes, "guidance_scale": 1.0, "sample_audio": with_sound}


def kandinsky_6_with_sound():
    return kandinsky_6(with_sound=True)


def repaint(**call):
    """Make RePaint's pipeline, whose loop goes back and forth."""
    denoiser = model_of(
        "UNet2DModel", sample_size=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :5] = 1
    given = {"image": 2 * picture(8) - 1, "mask_image": mask, "jump_length": 2, "jump_n_sample": 2, "eta": 0.5}
    return diffusers.RePaintPipeline(denoiser, diffusers.RePaintScheduler()), {**given, **call}
