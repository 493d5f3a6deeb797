"""Small pipelines of diffusers whose model predicts several things at once, with a stand-in for it."""

from __future__ import annotations

import torch

from tests.support.family_pipelines import LATENT_BETAS, named
from tests.support.guided_pipelines import Part, StandIn
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import nothing


class _OfPicturesAndTexts(StandIn):
    """A stand-in for UniDiffuser's model, which predicts the noise of a picture, its embedding and a text."""

    def forward(self, latent_image_embeds, image_embeds, prompt_embeds, timestep_img, timestep_text, data_type):
        t = torch.as_tensor(timestep_img / 1000).reshape(1)
        s = torch.as_tensor(timestep_text / 1000).reshape(1)
        return (
            self.shift(latent_image_embeds, prompt_embeds, t, 0.1 * s),
            self.shift(image_embeds, prompt_embeds, t, 0.2 * s),
            self.shift(prompt_embeds, image_embeds + latent_image_embeds.mean(), s, 0.3 * t),
        )


def uni_diffuser(**also):
    """Make UniDiffuser's pipeline, of pictures and texts together; what it calls its decoder of texts keeps them."""
    parts = nothing("clip_image_processor", "clip_tokenizer")
    pipe = diffusers.UniDiffuserPipeline(
        unet=_OfPicturesAndTexts(4, sample_size=8), scheduler=diffusers.DPMSolverMultistepScheduler(**LATENT_BETAS),
        vae=Part({"latent_channels": 4, "block_out_channels": (8,)}),
        text_encoder=Part({"hidden_size": 8, "max_position_embeddings": 5}), image_encoder=Part({"projection_dim": 6}),
        text_decoder=Part(prefix_inner_dim=8, prefix_hidden_dim=4, encode=lambda x: x[..., :4]),
        text_tokenizer=Part(), **parts,
    )  # fmt: skip
    pipe.decode_text_latents = lambda latents, device: latents
    return pipe, {"guidance_scale": 8.0, **also}


def uni_diffuser_of_a_text():
    """Make that of pictures alone, of one prompt."""
    return uni_diffuser(**named("prompt_embeds negative_prompt_embeds", (5, 8), (5, 8)))
