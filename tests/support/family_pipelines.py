"""Small pipelines of diffusers' families whose models are U-Nets, and what they are called with.

Each function makes a pipeline with random weights, and returns it with the arguments of its call. Nothing is
downloaded: text encoders are left out where the pipeline allows it, and are stand-ins where it does not.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import embeddings, nothing

CROSS_ATTENTION = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
LATENT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WITHOUT_CHECKS = {**nothing("safety_checker", "feature_extractor"), "requires_safety_checker": False}


def with_random_weights(model):
    """Draw a model's matrices, those that begin as zeros or unset memory too, so that all its inputs matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, weights[0].numel() ** -0.5, generator=generator)
    return model.eval()


def model_of(kind, **config):
    torch.manual_seed(0)
    return with_random_weights(getattr(diffusers, kind)(**config))


def unet(in_channels=4, out_channels=4, **config):
    given = {"sample_size": 8, "cross_attention_dim": 8, "attention_head_dim": 4, **CROSS_ATTENTION, **SMALL, **config}
    return model_of("UNet2DConditionModel", in_channels=in_channels, out_channels=out_channels, **given)


def autoencoder():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return model_of("AutoencoderKL", latent_channels=4, **kinds, **SMALL)


def picture(size=16):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def masked_picture():
    """Return a picture, and the mask of some columns, as arguments."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:12] = 1
    return {"image": picture(), "mask_image": mask, "height": 16, "width": 16}


def named(names, *sizes):
    """Return embeddings of these sizes as arguments of these names."""
    return dict(zip(names.split(), embeddings(*sizes), strict=True))


def prompts():
    return named("prompt_embeds negative_prompt_embeds", (5, 8), (5, 8))


def result(pipe, given, steps=4, **also):
    """Call a pipeline, and return what it makes: latents, where it can do without its decoder."""
    pipe.set_progress_bar_config(disable=True)
    how = {"output_type": "latent", "generator": torch.Generator().manual_seed(2), **given, **also}
    return pipe(**how, num_inference_steps=steps, return_dict=False)[0]


# ---- Stable Diffusion's relatives ----


def _stable_diffusion(kind, scheduler, *, denoiser=None, **also):
    """Make a relative of Stable Diffusion 1.5; latents have half the size of a picture."""
    parts = nothing("text_encoder", "tokenizer")
    return getattr(diffusers, kind)(
        unet=denoiser or unet(), vae=autoencoder(), scheduler=scheduler, **parts, **WITHOUT_CHECKS, **also
    )


def instruct_pix2pix():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**LATENT_BETAS)
    pipe = _stable_diffusion("StableDiffusionInstructPix2PixPipeline", scheduler, denoiser=unet(8))
    return pipe, {**prompts(), "image": picture(), "guidance_scale": 5.0, "image_guidance_scale": 1.5}


def in_parallel():
    """Make ParaDiGMS, whose loop makes a window of steps at once, until they agree."""
    pipe = _stable_diffusion("StableDiffusionParadigmsPipeline", diffusers.DDPMParallelScheduler(**LATENT_BETAS))
    return pipe, {**prompts(), "guidance_scale": 5.0, "parallel": 3, "tolerance": 0.1}


def perturbed_attention(adaptive=0.0):
    scheduler = diffusers.DPMSolverMultistepScheduler(**LATENT_BETAS, steps_offset=1)
    pipe = _stable_diffusion("StableDiffusionPAGPipeline", scheduler, pag_applied_layers=["mid"])
    return pipe, {
        **prompts(), "height": 16, "width": 16, "guidance_scale": 5.0, "pag_scale": 2.0, "pag_adaptive_scale": adaptive,
    }  # fmt: skip


def perturbed_attention_that_fades():
    return perturbed_attention(adaptive=0.001)


def inpainting():
    """Make the pipeline for a model that knows nothing of masks: it blends at every step."""
    pipe = _stable_diffusion("StableDiffusionInpaintPipeline", diffusers.DDIMScheduler(**LATENT_BETAS))
    return pipe, {**prompts(), **masked_picture(), "strength": 0.99, "guidance_scale": 5.0}


def latent_consistency():
    denoiser = unet(time_cond_proj_dim=8)
    pipe = _stable_diffusion(
        "LatentConsistencyModelPipeline", diffusers.LCMScheduler(**LATENT_BETAS), denoiser=denoiser
    )
    return pipe, {"prompt_embeds": prompts()["prompt_embeds"], "guidance_scale": 8.5, "height": 16, "width": 16}


def _stable_diffusion_xl(kind, in_channels=4):
    denoiser = unet(
        in_channels, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8, use_linear_projection=True,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT_BETAS, steps_offset=1, timestep_spacing="leading")
    parts = nothing("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = getattr(diffusers, kind)(unet=denoiser, vae=autoencoder(), scheduler=scheduler, **parts)
    return pipe, {**prompts(), **named("pooled_prompt_embeds negative_pooled_prompt_embeds", (8,), (8,))}


def stable_diffusion_xl():
    pipe, given = _stable_diffusion_xl("StableDiffusionXLPipeline")
    return pipe, {**given, "height": 16, "width": 16, "guidance_scale": 5.0}


def stable_diffusion_xl_rescaled():
    """Guide with the rescaled guidance of Lin et al. 2024, which needs deviations of the predictions."""
    pipe, given = stable_diffusion_xl()
    return pipe, {**given, "guidance_rescale": 0.7}


def stable_diffusion_xl_from_image():
    pipe, given = _stable_diffusion_xl("StableDiffusionXLImg2ImgPipeline")
    return pipe, {**given, "image": picture(), "strength": 0.75, "guidance_scale": 5.0}


def stable_diffusion_xl_inpainting():
    pipe, given = _stable_diffusion_xl("StableDiffusionXLInpaintPipeline")
    return pipe, {**given, **masked_picture(), "strength": 0.75, "guidance_scale": 5.0}


def stable_diffusion_xl_inpainting_model():
    """Make the pipeline for a model that is given the mask and the masked image."""
    pipe, given = _stable_diffusion_xl("StableDiffusionXLInpaintPipeline", in_channels=9)
    return pipe, {**given, **masked_picture(), "strength": 0.99, "guidance_scale": 5.0}


def latent_upscaler():
    """Make the pipeline that preconditions its model's output by itself, which has a channel too many."""
    denoiser = unet(8, 5, time_cond_proj_dim=128 + 8)
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT_BETAS, prediction_type="sample")
    pipe = diffusers.StableDiffusionLatentUpscalePipeline(
        unet=denoiser, vae=autoencoder(), scheduler=scheduler, **nothing("text_encoder", "tokenizer")
    )
    pooled = named("pooled_prompt_embeds negative_pooled_prompt_embeds", (8,), (8,))
    return pipe, {**prompts(), **pooled, "image": embeddings((4, 4, 4))[0], "guidance_scale": 4.0}


# ---- Kandinsky 2.2 ----


def _kandinsky_decoder_parts(scheduler):
    denoiser = unet(
        out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = model_of(
        "VQModel", latent_channels=4, num_vq_embeddings=4, vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **SMALL,
    )  # fmt: skip
    return {"unet": denoiser, "scheduler": scheduler, "movq": movq}


def _kandinsky_decoder(scheduler):
    pipe = diffusers.KandinskyV22Pipeline(**_kandinsky_decoder_parts(scheduler))
    embeds = named("image_embeds negative_image_embeds", (8,), (8,))
    return pipe, {**embeds, "height": 16, "width": 16, "guidance_scale": 4.0}


def kandinsky_decoder():
    betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    return _kandinsky_decoder(
        diffusers.DDPMScheduler(**betas, variance_type="learned_range", clip_sample=True, clip_sample_range=2.0)
    )


def kandinsky_decoder_without_variance():
    return _kandinsky_decoder(
        diffusers.DDIMScheduler(**LATENT_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    )


class Tokens:
    """Stand for a tokenizer: the letters' numbers, up to three."""

    model_max_length = 3

    def __call__(self, prompts, **how):
        ids = torch.tensor([[ord(letter) % 8 for letter in prompt[:3].ljust(3)] for prompt in prompts])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class TextEncoder(torch.nn.Module):
    """Stand for a text encoder with a projection: one vector for each number."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(8, 8)

    def forward(self, ids):
        embeds = self.embedding(ids)
        return SimpleNamespace(last_hidden_state=embeds, text_embeds=embeds.mean(1))


def _kandinsky_prior_parts():
    prior = model_of(
        "PriorTransformer", num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8,
        num_embeddings=3,
    )  # fmt: skip
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
    )
    encoders = {"text_encoder": TextEncoder(), "tokenizer": Tokens(), **nothing("image_encoder", "image_processor")}
    return {"prior": prior, "scheduler": scheduler, **encoders}


def kandinsky_prior():
    pipe = diffusers.KandinskyV22PriorPipeline(**_kandinsky_prior_parts())
    return pipe, {"prompt": "abc", "negative_prompt": "def", "guidance_scale": 4.0, "output_type": "pt"}


def kandinsky():
    """Make the prior and the decoder in one pipeline, each a pipeline of its own within it."""
    _, given = kandinsky_decoder()
    prior = {f"prior_{name}": part for name, part in _kandinsky_prior_parts().items()}
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    pipe = diffusers.KandinskyV22CombinedPipeline(**_kandinsky_decoder_parts(scheduler), **prior)
    given = {name: value for name, value in given.items() if not name.endswith("image_embeds")}
    return pipe, {**given, "prompt": "abc", "negative_prompt": "def", "prior_num_inference_steps": 3}


# ---- Stable Cascade ----

_CASCADE_TEXT = "prompt_embeds negative_prompt_embeds prompt_embeds_pooled negative_prompt_embeds_pooled"


def _cascade(**config):
    return model_of(
        "StableCascadeUNet", in_channels=4, out_channels=4, conditioning_dim=8, block_out_channels=(8, 8),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        dropout=(0.0, 0.0), clip_text_pooled_in_channels=8, timestep_ratio_embedding_dim=8, **config,
    )  # fmt: skip


def _cascade_text():
    return named(_CASCADE_TEXT, (5, 8), (5, 8), (1, 8), (1, 8))


def cascade_prior():
    prior = _cascade(clip_text_in_channels=8, clip_image_in_channels=8, switch_level=(False,))
    pipe = diffusers.StableCascadePriorPipeline(
        prior=prior, scheduler=diffusers.DDPMWuerstchenScheduler(), text_encoder=TextEncoder(), tokenizer=None
    )
    return pipe, {**_cascade_text(), "height": 170, "width": 170, "guidance_scale": 4.0, "output_type": "pt"}


def cascade_decoder():
    decoder = _cascade(effnet_in_channels=4, patch_size=2)
    pipe = diffusers.StableCascadeDecoderPipeline(
        decoder=decoder, scheduler=diffusers.DDPMWuerstchenScheduler(), latent_dim_scale=4.0,
        **nothing("text_encoder", "tokenizer", "vqgan"),
    )  # fmt: skip
    return pipe, {**_cascade_text(), **named("image_embeddings", (4, 2, 2)), "guidance_scale": 1.5}


# ---- Pixels: consistency models, and DeepFloyd IF ----


def consistency_model():
    denoiser = model_of(
        "UNet2DModel", sample_size=8, in_channels=3, out_channels=3, attention_head_dim=4, num_class_embeds=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **SMALL,
    )  # fmt: skip
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipe = diffusers.ConsistencyModelPipeline(unet=denoiser, scheduler=scheduler)
    return pipe, {"class_labels": 1, "output_type": "pt"}


def _variance(**config):
    return diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", **config)


def deepfloyd_if(**config):
    parts = {**nothing("text_encoder", "tokenizer", "watermarker"), **WITHOUT_CHECKS}
    pipe = diffusers.IFPipeline(unet=unet(3, 6), scheduler=_variance(**config), **parts)
    return pipe, {**prompts(), "guidance_scale": 7.0, "output_type": "pt"}


def deepfloyd_if_with_thresholding():
    """Make the pipeline with the scheduler as it is published."""
    return deepfloyd_if(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5)


def deepfloyd_if_with_dpm_solver():
    """Make the pipeline with a solver that drops the variance which the model learned."""
    pipe, given = deepfloyd_if()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(beta_end=0.002, variance_type="learned_range")
    return pipe, given


def deepfloyd_if_upscaling():
    parts = {**nothing("text_encoder", "tokenizer", "watermarker"), **WITHOUT_CHECKS}
    pipe = diffusers.IFSuperResolutionPipeline(
        unet=unet(6, 6, class_embed_type="timestep"), scheduler=_variance(), image_noising_scheduler=_variance(),
        **parts,
    )  # fmt: skip
    return pipe, {**prompts(), "image": picture(4) * 2 - 1, "guidance_scale": 4.0, "output_type": "pt"}
