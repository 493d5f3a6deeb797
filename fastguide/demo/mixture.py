"""A guided problem in closed form: a mixture of three Gaussians in the plane, of which each is a class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEANS = torch.tensor([[1.2, 0.9], [-1.3, 0.7], [0.1, -1.2]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.35, 0.25, 0.3], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)


def log_density(x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
    """Return the logarithm of the density of ``alpha * x_0 + sigma * epsilon``: shape (n, 2) to (n,)."""
    logs, _ = _components(x, alpha, sigma)
    return logs.logsumexp(-1)


def noise_prediction(x: Tensor, alpha: float, sigma: float, label: int | None = None) -> Tensor:
    """Return what a perfect model says of the noise, for a class or without one: ``-sigma`` times the score."""
    logs, scores = _components(x, alpha, sigma)
    if label is not None:
        return -sigma * scores[:, label]
    return -sigma * (logs.softmax(-1)[..., None] * scores).sum(1)


def _components(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Return the logarithm of each noised component's part of the density, and its score: (n, 3) and (n, 3, 2)."""
    variance = alpha**2 * DEVIATIONS.square() + sigma**2
    centred = x[:, None] - alpha * MEANS
    logs = WEIGHTS.log() - centred.square().sum(-1) / (2 * variance) - (2 * math.pi * variance).log()
    return logs, -centred / variance[:, None]
