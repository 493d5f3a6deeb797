"""pi-Flow's rollout: Chen et al. 2025, "pi-Flow: Policy-Based Few-Step Generation via Imitation Distillation".

``fastguide`` has no solver of this name; a drop-in has its rows here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """A model call's whole rollout, ``x' = of_sample * x + sum_k of_grid_k * v_k``."""

    of_sample: float
    of_grid: list[float]


def rollouts(
    raw_times: Tensor, sigmas: Tensor, *, shift: float, n_grid: int, num_substeps: int, eps: float
) -> list[Rollout]:
    """Return what each model call's rollout is, of the velocities v_k that the model predicts for a grid of times.

    A policy without a network integrates ``dx = (x - x_0(t)) / sigma * dsigma`` by Euler's method, with an x_0(t) that
    is linear between the grid's ``x - sigma * v_k`` (the DX policy of the paper). Both are linear in x and v_k.

    Args:
        raw_times: before the shift, where the calls begin, in float32; the last one ends at ``eps``.
        sigmas: where the calls begin.
        shift: ``sigma = shift * t / (1 + (shift - 1) * t)``.
        n_grid: the number of velocities, at least 2.
        num_substeps: of Euler's method, in a unit of raw time.
        eps: the least sigma that is divided by, and the least length of a call.
    """
    ends = torch.cat([raw_times[1:], raw_times.new_tensor([eps])])
    counts = ((raw_times - ends) * num_substeps).round().long().clamp(min=1)  # in float32, as diffusers does
    begins = raw_times.tolist()
    lengths = [begin - end for begin, end in zip(begins, [*begins[1:], eps], strict=True)]
    calls = zip(begins, sigmas.tolist(), lengths, counts.tolist(), strict=True)
    return [_rollout(*call, shift, n_grid, eps) for call in calls]


def _rollout(
    raw: float, sigma_begin: float, length: float, count: int, shift: float, n_grid: int, eps: float
) -> Rollout:
    grid_begin = sigma_begin / (shift + (1 - shift) * sigma_begin)
    grid_end = max(grid_begin - length, 0.0)
    grid_length, substep = max(grid_begin - grid_end, eps), length / count
    of_sample, of_grid, sigma = 1.0, [0.0] * n_grid, sigma_begin
    for _ in range(count):
        raw_time = sigma / (shift + (1 - shift) * sigma)
        raw = max(raw - substep, 0.0)
        after = shift * raw / (1 + (shift - 1) * raw)
        ratio = (after - sigma) / max(sigma, eps)
        of_sample += ratio * (of_sample - 1)
        at = _interpolation((raw_time - grid_end) / grid_length, n_grid)
        of_grid = [each + ratio * (each + sigma_begin * at.get(k, 0.0)) for k, each in enumerate(of_grid)]
        sigma = after
    return Rollout(of_sample, of_grid)


def _interpolation(place: float, n_grid: int) -> dict[int, float]:
    """Return what each of the grid's values counts at a place from 0, the first, to 1, the last."""
    position = min(max(place, 0.0), 1.0) * (n_grid - 1)
    first = min(int(position), n_grid - 2)
    return {first: first + 1 - position, first + 1: position - first}
