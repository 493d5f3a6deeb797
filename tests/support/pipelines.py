"""Small pipelines of diffusers with random weights, and one whose model costs nothing."""

from __future__ import annotations

import torch

from tests.support.scheduler_pair import diffusers

WIDTHS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def parts(in_channels=4):
    """Make a denoiser and an autoencoder."""
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


class FreeModel(torch.nn.Module):
    """A model whose output is a given tensor, or what a function makes of its input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, t):
        return (self.output if isinstance(self.output, torch.Tensor) else self.output(x),)


class FreePipeline(diffusers.DiffusionPipeline):
    """A pipeline as those of diffusers are written, of a ``FreeModel``; its output is twice the batch of latents."""

    def __init__(self, output, unet=None, scheduler=None):
        super().__init__()
        scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
        self.register_modules(unet=FreeModel(output) if unet is None else unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, steps, scale=7.5, rescale=0.0, after_step=lambda: None):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            noise_pred = self.unet(latents, t)[0]
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + scale * (noise_pred_text - noise_pred_uncond)
            if rescale > 0:
                rescaled = noise_pred * (noise_pred_text.std() / noise_pred.std())
                noise_pred = rescale * rescaled + (1 - rescale) * noise_pred
            latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
            after_step()
        return latents
