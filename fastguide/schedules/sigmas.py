"""Where the sigmas of a solver lie: the spacings of the field, and the timesteps of a schedule's sigmas. Float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._counts import check_count
from ._beta_quantile import beta_quantile

SigmaSpacing: TypeAlias = Literal["karras", "exponential", "beta"]
"""How sigmas are spaced between the largest and the smallest."""


def spaced_sigmas(
    spacing: SigmaSpacing, num_inference_steps: int, sigma_max: float, sigma_min: float, *, rho: float = 7.0
) -> Tensor:
    """Return sigmas that fall from ``sigma_max`` to ``sigma_min``: float64, shape ``(num_inference_steps,)``.

    Args:
        spacing: ``"karras"``, equidistant roots of degree rho (Karras et al. 2022, eq. 5); ``"exponential"``,
            equidistant logarithms; or ``"beta"``, quantiles of the distribution Beta(0.6, 0.6), dense at both ends (Lee
            et al. 2024, "Beta Sampling is All You Need").
        num_inference_steps: how many, both ends included; one is ``sigma_max``.
        sigma_max: the first.
        sigma_min: the last, smaller; positive with ``"exponential"``.
        rho: of ``"karras"``.

    Raises:
        ValueError: an argument is not as described.

    >>> spaced_sigmas("exponential", 3, 4.0, 0.25).tolist()
    [4.0, 1.0, 0.25]
    """
    if spacing not in get_args(SigmaSpacing):
        raise ValueError(f"sigma_spacing: expected one of {get_args(SigmaSpacing)}, got {spacing!r}")
    check_count("num_inference_steps", num_inference_steps)
    least = "above 0" if spacing == "exponential" else "from 0 on"
    if not 0 <= sigma_min < sigma_max < math.inf or (spacing == "exponential" and sigma_min == 0):
        raise ValueError(f"sigma_min: expected a number {least} and below sigma_max = {sigma_max:g}, got {sigma_min!r}")
    ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64, device="cpu")
    if spacing == "karras":
        first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        sigmas = torch.pow(first + ramp * (last - first), rho)
    elif spacing == "exponential":
        first, last = math.log(sigma_max), math.log(sigma_min)
        sigmas = torch.linspace(first, last, num_inference_steps, dtype=torch.float64, device="cpu").exp()
    else:
        found = [beta_quantile(p, 0.6, 0.6) for p in (1 - ramp).tolist()]
        quantiles = torch.tensor(found, dtype=torch.float64, device="cpu")
        sigmas = sigma_min + quantiles * (sigma_max - sigma_min)
    sigmas[-1] = sigma_min  # a step may stay there, and is none only if no digit differs
    sigmas[0] = sigma_max
    return sigmas


def linear_quadratic_sigmas(
    num_inference_steps: int, *, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Tensor:
    """Return a flow's sigmas that fall from 1, first in equal small steps, then in quadratically growing ones.

    The schedule of Mochi and LTX-Video (``linear_quadratic_schedule`` in their code); give it as ``sigmas=``.

    Args:
        num_inference_steps: how many; the last step, to 0, comes after them.
        threshold_noise: how far the linear part falls, above 0 and below 1.
        linear_steps: the steps of the linear part, fewer than all; ``None``: half of them.

    Returns:
        Float64, shape ``(num_inference_steps,)``.

    Raises:
        ValueError: an argument is not as described.

    >>> linear_quadratic_sigmas(4, threshold_noise=0.1)
    tensor([1.0000, 0.9500, 0.9000, 0.6500], dtype=torch.float64)
    """
    check_count("num_inference_steps", num_inference_steps, 2)
    linear = num_inference_steps // 2 if linear_steps is None else linear_steps
    check_count("linear_steps", linear)
    if linear >= num_inference_steps:
        raise ValueError(f"linear_steps: expected fewer than num_inference_steps = {num_inference_steps}, got {linear}")
    if not 0 < threshold_noise < 1:
        raise ValueError(f"threshold_noise: expected a number above 0 and below 1, got {threshold_noise!r}")
    # 1 - sigma is threshold * i / linear, and from i = linear on a parabola that continues it and is 1 at the end
    quadratic = num_inference_steps - linear
    difference = linear - threshold_noise * num_inference_steps
    a = difference / (linear * quadratic**2)
    b = threshold_noise / linear - 2 * difference / quadratic**2
    i = torch.arange(num_inference_steps, dtype=torch.float64, device="cpu")
    return torch.where(i < linear, 1 - i * threshold_noise / linear, 1 - (a * i.square() + b * i + a * linear**2))


def sigmas_at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Return the sigmas of real timesteps, linear between those of the training timesteps.

    Args:
        table: the sigma of each training timestep, float64, shape ``(num_train_timesteps,)``.
        timesteps: float64, any values: beyond the table are its ends.
    """
    clamped = timesteps.clamp(0, len(table) - 1)
    low = clamped.floor().long().clamp(max=max(len(table) - 2, 0))
    high = (low + 1).clamp(max=len(table) - 1)
    return table[low] + (clamped - low) * (table[high] - table[low])


def timesteps_at(table: Tensor, sigmas: Tensor) -> Tensor:
    """Return the real timesteps of sigmas, log-linear between the training timesteps: the inverse that samplers use.

    Args:
        table: the sigma of each training timestep, rising, float64, shape ``(num_train_timesteps,)``, two or more.
        sigmas: float64; beyond the table are its ends.
    """
    logs, wanted = table.log(), sigmas.clamp(min=1e-10).log()
    low = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, len(table) - 2)
    weight = ((logs[low] - wanted) / (logs[low] - logs[low + 1])).clamp(0, 1)
    return (1 - weight) * low + weight * (low + 1)


def given_sigmas(name: str, values: Tensor | Sequence[float], *, least: int = 1, zero_last: bool = False) -> Tensor:
    """Return a caller's sigmas (or timesteps) as float64 on the CPU; refuse them unless they fall and are positive.

    Args:
        name: of the argument, for messages.
        values: the sigmas, strictly falling.
        least: how many there have to be.
        zero_last: whether the last may be 0.
    """
    try:
        dtype = torch.as_tensor(values).dtype
        sigmas = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or a sequence of numbers, got {values!r}") from error
    if dtype == torch.bool or dtype.is_complex:
        raise TypeError(f"{name}: expected real numbers, got {dtype}")
    if sigmas.dim() != 1 or len(sigmas) < least:
        raise ValueError(f"{name}: expected one dimension and at least {least} values, got {tuple(sigmas.shape)}")
    positive = sigmas[:-1] if zero_last else sigmas
    if not bool(sigmas.isfinite().all()) or not bool((positive > 0).all()) or bool(sigmas[-1] < 0):
        raise ValueError(f"{name}: expected finite positive values, got {sigmas.tolist()}")
    if bool((sigmas.diff() >= 0).any()):
        raise ValueError(f"{name}: expected strictly falling values, got {sigmas.tolist()}")
    return sigmas
