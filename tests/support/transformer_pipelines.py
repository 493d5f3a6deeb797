"""Small pipelines of diffusers whose models are transformers, with random weights, and what they are called with."""

from __future__ import annotations

import torch

from tests.support.scheduler_pair import diffusers


def autoencoder(channels):
    return diffusers.AutoencoderKL(
        latent_channels=channels, norm_num_groups=4, block_out_channels=(8,), layers_per_block=1
    ).eval()


def embeddings(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, *size, generator=generator) for size in sizes]


def nothing(*names):
    return dict.fromkeys(names)


def stable_diffusion_3():
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4), **nothing("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3"),
        tokenizer_3=None,
    )  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeddings((5, 32), (5, 32), (64,), (64,)), strict=True))
    return pipe, {**given, "height": 64, "width": 64, "guidance_scale": 5.0}


def flux(*, guided=False):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(1), **nothing("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )  # fmt: skip
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeddings((5, 32), (32,), (5, 32), (32,)), strict=True))
    if not guided:
        given = {name: values for name, values in given.items() if not name.startswith("negative")}
    return pipe, {**given, "height": 16, "width": 16, **({"true_cfg_scale": 3.0} if guided else {})}


def wan():
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    pipe = diffusers.WanPipeline(
        transformer=transformer.eval(), scheduler=scheduler, vae=vae.eval(), text_encoder=None, tokenizer=None
    )
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings((5, 16), (5, 16)), strict=True))
    return pipe, {**given, "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 5.0}
