"""Two small networks: a class-conditional denoiser with a null class, and a noise-aware classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .digits import NUM_CLASSES, SHAPE

NULL_CLASS = NUM_CLASSES
"""The label that means no condition."""

_PIXELS = math.prod(SHAPE)


class _TimeEmbedding(nn.Module):
    """Embed a timestep by sines and cosines (Vaswani et al. 2017) and two layers."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -math.log(10_000), 32)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * self.frequencies
        embedding: Tensor = self.layers(torch.cat([angles.sin(), angles.cos()], -1))
        return embedding


class _Block(nn.Module):
    """A residual layer whose input an embedding scales and shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, -1)
        update: Tensor = self.layers(self.norm(x) * (1 + scale) + shift)
        return x + update


class _Network(nn.Module):
    def __init__(self, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.time = _TimeEmbedding(width)
        self.first = nn.Linear(_PIXELS, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def outputs(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, torch.nn.functional.silu(embedding))
        result: Tensor = self.last(hidden)
        return result


class Denoiser(_Network):
    """Predict epsilon from x_t of shape (batch, 1, 8, 8), timesteps and labels; ``NULL_CLASS`` means no condition."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__(width, depth, _PIXELS)
        self.label = nn.Embedding(NUM_CLASSES + 1, width)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise in x, of the shape of x."""
        return self.outputs(x, self.time(timestep) + self.label(labels)).view_as(x)


class NoiseAwareClassifier(_Network):
    """Classify x_t of shape (batch, 1, 8, 8) at any timestep."""

    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__(width, depth, NUM_CLASSES)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return the logits of the ten classes, shape (batch, 10)."""
        return self.outputs(x, self.time(timestep))
