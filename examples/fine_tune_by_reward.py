"""Fine-tune a small model by a reward, through the last steps of its sampler (DRaFT-K, Clark et al. 2024).

A model of a ring in the plane learns to prefer the ring's right side. The reward's gradient goes back through the last
two steps alone, of twenty, and each is computed anew on the way back, so that the memory is that of one step.

    python examples/fine_tune_by_reward.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fastguide

SCHEDULE = fastguide.NoiseSchedule.linear()


class Model(torch.nn.Module):
    """Predicts the noise of a point in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise in x, shape (batch, 2), at timesteps t, shape (batch,)."""
        angle = t[:, None] * (0.5 * math.pi / 1000)
        out: Tensor = self.body(torch.cat([x, angle.sin(), angle.cos()], -1))
        return out


def ring(count: int) -> Tensor:
    """Draw points of the ring."""
    angle, radius = 2 * math.pi * torch.rand(count), 1 + 0.1 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def reward(x: Tensor) -> Tensor:
    """Return how near a point is to the ring's rightmost: 0 there, negative elsewhere."""
    return -(x - torch.tensor([1.0, 0.0])).norm(dim=1)


def pretrain(model: Model, iterations: int = 300) -> None:
    """Let the model learn the ring."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(iterations):
        loss = fastguide.denoising_loss(model, SCHEDULE, ring(512))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fine_tune(model: Model, sampler: fastguide.Sampler, iterations: int = 40) -> list[float]:
    """Raise the reward of the samples; return it at each iteration."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rewards = []
    for _ in range(iterations):
        x_0 = sampler.differentiable(torch.randn(128, 2), last=2, checkpoint=True)
        mean = reward(x_0).mean()
        optimizer.zero_grad()
        (-mean).backward()
        optimizer.step()
        rewards.append(mean.item())
    return rewards


def main() -> tuple[float, float]:
    """Return the mean reward before and after."""
    torch.manual_seed(0)
    model = Model()
    pretrain(model)
    sampler = fastguide.Sampler(model, fastguide.ddim(SCHEDULE, 20))
    noise = torch.randn(1024, 2)
    before = reward(sampler(noise)).mean().item()
    fine_tune(model, sampler)
    after = reward(sampler(noise)).mean().item()
    print(f"reward before {before:.2f}, after {after:.2f}")
    return before, after


if __name__ == "__main__":
    main()
