"""The timesteps of models distilled from a few original steps: latent consistency and trajectory consistency."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._counts import check_count
from ..schedules.noise_schedule import NoiseSchedule
from ._columns import check_schedule, visited_timesteps


def distilled_timesteps(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    original_inference_steps: int,
    timesteps: Tensor | Sequence[int] | None,
) -> Tensor:
    """Return evenly chosen timesteps of those that the model was distilled at (Luo et al. 2023, section 4.3).

    Those are ``k - 1, 2k - 1, ...`` with k the training timesteps over the original steps; the first is always visited.
    """
    check_schedule(schedule)
    if timesteps is not None:
        return visited_timesteps(schedule, num_inference_steps, "leading", 0, timesteps)
    if num_inference_steps is None:
        raise ValueError("num_inference_steps: expected a number, or timesteps=, got None")
    check_count("num_inference_steps", num_inference_steps)
    check_count("original_inference_steps", original_inference_steps)
    if original_inference_steps > len(schedule):
        raise ValueError(
            f"original_inference_steps: expected at most {len(schedule)}, the training timesteps, "
            f"got {original_inference_steps}"
        )
    if num_inference_steps > original_inference_steps:
        raise ValueError(
            f"num_inference_steps: expected at most original_inference_steps = {original_inference_steps}, "
            f"got {num_inference_steps}"
        )
    stride = len(schedule) // original_inference_steps
    original = torch.arange(original_inference_steps, 0, -1, device="cpu") * stride - 1
    places = torch.arange(num_inference_steps, device="cpu") * original_inference_steps // num_inference_steps
    return original[places]
