"""Make a step of a flow in which each token has a timestep of its own: to the kernel, each token is a sample.

Such a step is ``x' = x + dt * m``, with a dt for each token: it is a part of the weights of the token's predictions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..guidance import Guidance
from ..guidance.weights import UNGUIDED
from ..solvers import StepTable
from ..step.guided_step import guided_step
from .counted_run import inputs_of
from .counted_step import is_integer
from .fitted import SHAPES, fitted_predictions, refusal_of
from .guidance_arguments import Scale, guidance_of
from .lazy_guidance import resolved
from .lazy_tensor import plain
from .scheduler_step import LEFT, count, count_fused

LATER = 1e-6
"""By how much a sigma has to be below that of a token for the token's step to lead there."""


def per_token_step(
    scheduler: Any,
    model_output: Any,
    timestep: Any,
    sample: Tensor,
    timesteps: Tensor,
    guidance_scale: Scale | None,
) -> Tensor | None:
    """Make a step of ``FlowMatchEulerDiscreteScheduler``; ``None``: it is left to diffusers' own ``step``.

    Args:
        scheduler, model_output, timestep, guidance_scale: of ``step``.
        sample: of shape (batch, tokens, channels); it is copied if its tokens are not one after the other.
        timesteps: ``per_token_timesteps``, in float32, of shape (batch or 1, tokens or 1).

    Returns:
        The sample in float32, as diffusers returns it.
    """
    if is_dynamo_compiling() or is_integer(timestep):
        return None
    output, scale = resolved(model_output, sample, guidance_scale)
    sample, timesteps = plain(sample), plain(timesteps)
    guidance = guidance_of(output, sample, scale, None, 1.0, "epsilon")
    refusal = refusal_of(sample, output, None, None) or _why_not(scheduler, sample, output.dtype, timesteps, guidance)
    sample = sample.contiguous()  # as pipelines pack it, the first one has its channels one after the other
    fitted = None if refusal else fitted_predictions(output, sample, guidance, False)
    if fitted is None:
        count(scheduler, LEFT + (refusal or SHAPES))
        return None
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    lead = 1 if timesteps.shape[1] == 1 else 2
    predictions = [each.flatten(0, lead - 1) for each in inputs_of(sample, fitted[0])[1:]]
    weights = _weights(scheduler, timesteps, guidance, sample, lead)
    result = torch.empty_like(sample, dtype=torch.float32)
    guided_step(
        _table(sample.device),
        0,
        sample.flatten(0, lead - 1),
        predictions if isinstance(fitted[0], list) else predictions[0],
        Guidance(weights, None),
        out=result.flatten(0, lead - 1),
    )
    scheduler._step_index += 1
    count_fused(scheduler, guidance, is_last=scheduler._step_index >= len(scheduler.timesteps))
    return result


def _why_not(
    scheduler: Any, sample: Tensor, model: torch.dtype, timesteps: Tensor, guidance: Guidance | None
) -> str | None:
    """Say why a step is left to diffusers; ``None``: it is not."""
    if scheduler._internal_dict["stochastic_sampling"]:
        return "timesteps for each token, with noise"
    if torch.float64 in (sample.dtype, model):
        return "timesteps for each token, in float64"
    described = timesteps.dtype == torch.float32 and timesteps.dim() == 2 and timesteps.device == sample.device
    if not described or timesteps.requires_grad:
        return "timesteps for each token that are not as described"
    batch, tokens = sample.shape[:2] if sample.dim() == 3 else (0, 0)
    if timesteps.shape[0] not in (1, batch) or timesteps.shape[1] not in (1, tokens):
        return SHAPES
    constant = guidance is None or (guidance.weights_from is None and guidance.steps == 1)
    return None if constant else "timesteps for each token, with weights that are made of the predictions"


def _weights(scheduler: Any, timesteps: Tensor, guidance: Guidance | None, sample: Tensor, lead: int) -> Tensor:
    """Return the weights of each sample, or of each token, of shape (1, samples or tokens, columns)."""
    sigmas = timesteps / scheduler._internal_dict["num_train_timesteps"]
    table = scheduler.sigmas.to(sample.device)[:, None, None]
    after = torch.where(table < sigmas - LATER, table, 0.0).amax(0)
    dt = (sigmas - after).expand(sample.shape[0], -1 if lead == 1 else sample.shape[1])
    weights = (UNGUIDED if guidance is None else guidance).weights(sample.device, torch.float32)[0]
    of_tokens: Tensor = dt[..., None] * weights[:, None]
    return of_tokens.flatten(0, 1)[None]


@functools.cache
def _table(device: torch.device) -> StepTable:
    """Return ``x' = x + m``."""
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return StepTable.from_columns(
        torch.zeros(1, device="cpu"), {"out_sample": one, "out_pred": one}, name="timesteps for each token"
    ).to(device)
