"""A diffusers scheduler's transitions as step tables: the row's number is the training timestep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..solvers.ddim import ddim_table
from ..solvers.ddpm import ddpm_table
from ..solvers.table import StepTable

UNDEFINED = "it leads nowhere, or the schedule has no signal at that timestep"


def host_alphas(scheduler: Any) -> Tensor:
    """abar of every training timestep, on the host, in float32.

    diffusers takes 1 - abar and the like in float32, which loses four digits where abar is near 1. Rows that are to
    give the same picture have to lose them too; ``fastguide.ddpm`` and ``fastguide.ddim`` do not.
    """
    alphas: Tensor = scheduler.alphas_cumprod.detach().to("cpu", torch.float32)
    return alphas


def ddim_transitions(
    scheduler: Any,
    eta: float,
    use_clipped_model_output: bool,
    inverse: bool = False,
    *,
    at: Tensor | None = None,
    undefined: str | None = UNDEFINED,
) -> StepTable:
    """From every timestep t to t - num_train_timesteps // num_inference_steps, as ``DDIMScheduler.step`` goes.

    ``inverse``: to t from that one, as ``DDIMInverseScheduler.step``; ``at``: only from these timesteps, in this order.
    """
    config, alphas = scheduler.config, host_alphas(scheduler)
    final = float(scheduler.initial_alpha_cumprod if inverse else scheduler.final_alpha_cumprod)
    here = torch.arange(len(alphas), device="cpu") if at is None else at
    there = here - config.num_train_timesteps // scheduler.num_inference_steps
    a, a_prev = alphas[here], torch.where(there >= 0, alphas[there.clamp(min=0)], final)
    if inverse:
        a, a_prev = a_prev, a
    a_known = a_prev.clone()
    if at is not None:  # a loop, which ends with its last step
        a_known[-1] = 1.0
    return ddim_table(
        here,
        a,
        a_prev,
        inpainting_levels=Levels.from_alphas_cumprod(a_known),
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        prediction_type=config.prediction_type,
        clip_sample_range=config.clip_sample_range if config.clip_sample else None,
        undefined=undefined,
    )


def ddpm_transitions(
    scheduler: Any,
    timesteps: tuple[int, ...] | None,
    *,
    at: Tensor | None = None,
    undefined: str | None = UNDEFINED,
) -> StepTable:
    """From every one of ``timesteps`` to the next, as ``DDPMScheduler.step`` goes; ``None``: from every t to t - 1.

    Noise is added at every timestep but 0, also where a trailing spacing ends at another. ``at``: only from these.
    """
    config, alphas = scheduler.config, host_alphas(scheduler)
    here = torch.arange(len(alphas), device="cpu")
    there = here - 1
    if timesteps is not None:
        there = torch.full_like(here, len(alphas))  # nowhere
        for timestep, following in reversed(list(zip(timesteps, (*timesteps[1:], -1), strict=True))):
            there[timestep] = following  # of one that comes twice, from its first place
    padded = torch.cat([alphas, alphas.new_tensor([torch.nan, 1.0])])  # nowhere, and -1
    here = here if at is None else at
    return ddpm_table(
        here,
        alphas[here],
        padded[there[here]],
        here > 0,
        prediction_type=config.prediction_type,
        variance_type=scheduler.variance_type,
        clip_sample_range=config.clip_sample_range if config.clip_sample else None,
        undefined=undefined,
    )
