"""Consistency models, multistep sampling: Song et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._counts import check_count
from ..schedules.levels import Levels
from ..schedules.sigmas import given_sigmas
from ._columns import check_range, inpainting_columns
from .table import StepTable

_NO_EPSILON = "a consistency model predicts the end of the trajectory, and no epsilon to shift; use form='mean'"


def consistency(
    num_inference_steps: int | None = None,
    *,
    num_train_timesteps: int = 40,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    rho: float = 7.0,
    s_noise: float = 1.0,
    clip_sample_range: float | None = 1.0,
    timesteps: Tensor | Sequence[int] | None = None,
) -> StepTable:
    """Return the steps of a consistency model: predict x_0, noise it to the next sigma (Song et al. 2023, algorithm 1).

    ``x_0 = c_skip * x + c_out * prediction`` with ``c_skip = d^2 / ((sigma - sigma_min)^2 + d^2)`` and
    ``c_out = d * (sigma - sigma_min) / sqrt(sigma^2 + d^2)``, d = sigma_data (appendix C), clipped; then
    ``x' = x_0 + sqrt(sigma'^2 - sigma_min^2) * z``. The sample is unscaled; the model's input is
    ``x / sqrt(sigma^2 + d^2)``, its timestep ``250 * log(sigma)``.

    Args:
        num_inference_steps: number of steps, if ``timesteps`` does not say them; at most ``num_train_timesteps``.
        num_train_timesteps: the number of sigmas that the model was trained at, of Karras et al.'s spacing.
        sigma_min, sigma_max, rho: of that spacing.
        sigma_data: the standard deviation of the data.
        s_noise: the standard deviation of z.
        clip_sample_range: the predicted x_0 is clipped to ``[-range, range]``; ``None``: not at all.
        timesteps: places in the spacing, strictly falling, that are visited; counted from the largest sigma, as
            diffusers counts: the steps of ``[22, 0]`` are at places 0 and 22.

    Returns:
        The step table, its timesteps real.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> consistency(timesteps=[22, 0]).levels.sigma
    tensor([80.0000,  1.3824], dtype=torch.float64)
    """
    for name, value in (("sigma_data", sigma_data), ("rho", rho)):
        check_range(name, value, 0.0, math.inf, above=True)
    check_range("sigma_max", sigma_max, 0.0, math.inf, above=True)
    check_range("sigma_min", sigma_min, 0.0, sigma_max, above=True)
    check_range("s_noise", s_noise, 0.0, math.inf)
    if clip_sample_range is not None:
        check_range("clip_sample_range", clip_sample_range, 0.0, math.inf, above=True)
    places = _places(num_inference_steps, num_train_timesteps, timesteps)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    now = (first + places / (num_train_timesteps - 1) * (last - first)).pow(rho)
    visited = torch.cat([now, now.new_tensor([sigma_min])])
    return consistency_table(
        visited, 250 * now.log(), sigma_min, sigma_max, sigma_data=sigma_data, s_noise=s_noise,
        clip_sample_range=clip_sample_range,
    )  # fmt: skip


def consistency_table(
    visited: Tensor,
    timesteps: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    sigma_data: float,
    s_noise: float,
    clip_sample_range: float | None,
) -> StepTable:
    """Return ``consistency`` over any sigmas, where steps begin and where the last one ends, and timesteps."""
    now, after = visited[:-1], visited[1:].clamp(sigma_min, sigma_max)
    one, distance = torch.ones_like(now), now - sigma_min
    added = (after.square() - sigma_min**2).clamp(min=0).sqrt()
    in_scale = (now.square() + sigma_data**2).rsqrt()
    columns = {
        "x0_scale": one,
        "x0_sample": sigma_data**2 / (distance.square() + sigma_data**2),
        "x0_pred": distance * sigma_data * in_scale,
        "clip": torch.full_like(now, torch.inf if clip_sample_range is None else clip_sample_range),
        "out_x0": one,
        "out_noise": s_noise * added,
        "in_scale": torch.cat([in_scale[1:], one[:1]]),
    }
    return StepTable.from_columns(
        timesteps,
        columns | inpainting_columns(Levels.variance_exploding(added)),
        gradients={
            "epsilon": _NO_EPSILON,
            "epsilon_after_clip": _NO_EPSILON,
            "mean": {"out_grad": columns["out_noise"].square()},
        },
        levels=Levels.variance_exploding(now),
        first_in_scale=in_scale[0].item(),
        init_noise_sigma=sigma_max,
        name="consistency",
    )


def _places(
    num_inference_steps: int | None, num_train_timesteps: int, timesteps: Tensor | Sequence[int] | None
) -> Tensor:
    """Return the places in the training spacing, rising, 0 being the largest sigma."""
    check_count("num_train_timesteps", num_train_timesteps, 2)
    if timesteps is not None:
        places = given_sigmas("timesteps", timesteps, zero_last=True).flip(0)
        if bool((places != places.floor()).any()) or places[-1] >= num_train_timesteps:
            raise ValueError(
                f"timesteps: expected whole numbers from 0 to {num_train_timesteps - 1}, got {places.flip(0).tolist()}"
            )
        if num_inference_steps is not None and num_inference_steps != len(places):
            raise ValueError(f"num_inference_steps: expected {len(places)}, got {num_inference_steps}")
        return places
    if num_inference_steps is None:
        raise ValueError("num_inference_steps: expected a number, or timesteps=, got None")
    check_count("num_inference_steps", num_inference_steps)
    if num_inference_steps > num_train_timesteps:
        raise ValueError(
            f"num_inference_steps: expected at most num_train_timesteps = {num_train_timesteps}, "
            f"got {num_inference_steps}"
        )
    stride = num_train_timesteps // num_inference_steps
    return torch.arange(num_inference_steps, dtype=torch.float64, device="cpu") * stride
