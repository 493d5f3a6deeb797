"""Small pipelines of diffusers that guide sound, with a stand-in for their model."""

from __future__ import annotations

import torch

from tests.support.family_pipelines import embeddings
from tests.support.guided_pipelines import Part, StandIn, flow
from tests.support.scheduler_pair import diffusers
from tests.support.transformer_pipelines import nothing


class _Conditions(Part):
    """A stand-in for ACE-Step's encoder of conditions: two prompts have two."""

    def __init__(self):
        super().__init__()
        self.silence_latent = torch.zeros(1, 750, 4)
        self.null_condition_emb = embeddings((1, 8))[0]

    def forward(self, text_hidden_states, **how):
        return text_hidden_states, None


def ace_step(**also):
    """Make ACE-Step, whose guidance is projected, with momentum, in each channel of two songs."""
    transformer = StandIn(4, dim=2, audio_acoustic_hidden_dim=4)
    vae = Part({"sampling_rate": 10, "downsampling_ratios": (1,)}, use_tiling=True, enable_tiling=lambda: None)
    pipe = diffusers.AceStepPipeline(
        transformer=transformer, vae=vae, condition_encoder=_Conditions(),
        scheduler=flow(num_train_timesteps=1), **nothing("text_encoder", "tokenizer"),
    )  # fmt: skip
    texts = torch.cat(embeddings((5, 8), (5, 8)))
    pipe.encode_prompt = lambda prompt, instruction, **how: (texts * (1 + 0.1 * len(instruction)), None, None, None)
    given = {"prompt": ["a song", "another"], "lyrics": ["", ""], "audio_duration": 3.0, "guidance_scale": 7.0}
    return pipe, {**given, **also}


def ace_step_in_an_interval():
    """Make ACE-Step that guides the steps in the middle alone."""
    return ace_step(cfg_interval_start=0.1, cfg_interval_end=0.5)
