"""Small pipelines of diffusers that have a scheduler of their own, which hardly any other pipeline has."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.support.family_pipelines import embeddings, model_of, named, picture
from tests.support.guided_pipelines import Part, StandIn
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import nothing


def kandinsky_6(with_sound=False, **also):
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
    return pipe, {**given, **sizes, "guidance_scale": 1.0, "sample_audio": with_sound, **also}


def kandinsky_6_with_sound():
    return kandinsky_6(with_sound=True)


def kandinsky_6_guided():
    """Make that with sound, guided: its model's outputs hold three velocities each."""
    given = named("negative_prompt_embeds", (5, 8)) | {"negative_pooled_prompt_embeds": embeddings((8,))[0]}
    return kandinsky_6(with_sound=True, guidance_scale=5.0, **{name: -0.5 * each for name, each in given.items()})


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


class _Protein(Part):
    """A stand-in for RFD4-Proteina's model, whose tokens have to do with each other."""

    def forward(self, bb_ca, local_latents, bb_ca_time, local_latents_time, padding_mask, **how):
        mean = (bb_ca.mean(-1, keepdim=True) + local_latents.mean(-1, keepdim=True)).cumsum(1) / bb_ca.shape[1]
        backbone = torch.tanh(mean + 0.5 * bb_ca) * (1 + bb_ca_time[:, None, None])
        latents = torch.tanh(mean - 0.3 * local_latents) * (2 - local_latents_time[:, None, None])
        logits = backbone.repeat(1, 1, 2)
        return SimpleNamespace(
            backbone=backbone, local_latents=latents, sequence_logits=logits, insertion_logits=logits[..., 0]
        )


class _ProteinDecoder(Part):
    """A stand-in for its autoencoder."""

    def decode(self, z_latent, ca_coors_nm, padding_mask, **how):
        atoms = z_latent.mean(-1)[..., None, None] + ca_coors_nm[:, :, None].expand(-1, -1, 37, -1)
        every = torch.ones(atoms.shape[:3], dtype=torch.bool)
        return SimpleNamespace(
            coordinates=atoms, residue_type=padding_mask.long(), emit_mask=padding_mask, atom_mask=every
        )


def rfd4_proteina():
    """Make RFD4-Proteina's pipeline, which has a scheduler for the backbone and one for what is around it."""
    rescaling = {"tail_steps": 2, "tsr_k": 1.5, "tsr_sigma": 0.8}
    pipe = diffusers.RFD4ProteinaPipeline(
        _Protein({"latent_dim": 4, "feats_seq": []}), _ProteinDecoder({"latent_dim": 4}),
        diffusers.RFD4ProteinaScheduler(schedule_mode="log", noise_mode="1/t", **rescaling),
        diffusers.RFD4ProteinaScheduler(schedule_mode="power", noise_mode="tan", **rescaling), recycle_depths=[1] * 8,
    )  # fmt: skip
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, 6:] = False
    context = torch.zeros_like(padding)
    context[:, 2] = True
    conditions = {"condition_sequence_1_residue": torch.zeros(2, 9, dtype=torch.long), "molecule_iid": padding.long()}
    return pipe, {
        "padding_mask": padding, "is_in_context_conditioning": context, "supports_local_latent": padding,
        "conditioning_features": conditions,
    }  # fmt: skip


def score_sde():
    """Make the score SDE's pipeline, of noise up to a sigma of 4."""
    denoiser = model_of(
        "UNet2DModel", sample_size=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.ScoreSdeVePipeline(denoiser, diffusers.ScoreSdeVeScheduler(sigma_max=4.0))


def cosmos(**config):
    """Make Cosmos 1.0, which asks its scheduler for x_0, guides that, and gives it back."""
    scheduler = diffusers.EDMEulerScheduler(**{"sigma_max": 80.0, "final_sigmas_type": "sigma_min", **config})
    pipe = diffusers.CosmosTextToWorldPipeline(
        transformer=StandIn(4), scheduler=scheduler, safety_checker=Part(),
        **nothing("text_encoder", "tokenizer", "vae"),
    )  # fmt: skip
    given = named("prompt_embeds negative_prompt_embeds", (5, 8), (5, 8))
    return pipe, {**given, "height": 64, "width": 64, "num_frames": 9, "guidance_scale": 7.0}


def cosmos_not_guided():
    pipe, given = cosmos()
    return pipe, {**given, "guidance_scale": 1.0}
