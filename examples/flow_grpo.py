"""Raise a reward by reinforcement learning on the sampler itself: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470).

A flow of a mixture of three Gaussians in the plane learns to sample the one that a reward prefers, which need not be
differentiable: a step is an action that comes with its log-probability, and an advantage is a reward against those of
its group.

    python examples/flow_grpo.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastguide

SCHEDULE = fastguide.FlowSchedule()
MEANS = torch.tensor([[1.2, 0.9], [-1.3, 0.7], [0.1, -1.2]])
CLIP, LEARNING_RATE, GROUP = 0.2, 1e-3, 256


class Velocity(torch.nn.Module):
    """Predicts the velocity of a point in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at x, shape (batch, 2), at times t, shape (batch,), of 0 to 1000."""
        out: Tensor = self.body(torch.cat([x, t[:, None] / 1000], -1))
        return out


def mixture(count: int) -> Tensor:
    """Draw points of the mixture."""
    return MEANS[torch.randint(3, (count,))] + 0.25 * torch.randn(count, 2)


def reward(x: Tensor) -> Tensor:
    """Return 1 for points of the first Gaussian, and 0 for others: nothing to differentiate."""
    return (torch.cdist(x, MEANS).argmin(1) == 0).float()


def pretrain(model: Velocity, iterations: int = 300) -> None:
    """Let the model learn the mixture."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(iterations):
        loss = fastguide.denoising_loss(model, SCHEDULE, mixture(512), prediction_type="flow_prediction")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def improve(model: Velocity, table: fastguide.StepTable, optimizer: torch.optim.Optimizer) -> float:
    """Sample a group, and move the policy towards what was better than its mean; return that mean."""
    way = fastguide.Sampler(model, table).trajectory(torch.randn(GROUP, 2), originals=False, log_prob=True)
    assert isinstance(way, fastguide.PolicyTrajectory)
    assert way.samples is not None
    rewards = reward(way.sample)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    for call in torch.randperm(len(table)).tolist():
        velocity = model(way.samples[call], table.timesteps[call].float().expand(GROUP))
        log_prob = fastguide.log_prob_of(table, call, way.samples[call], velocity, None, way.samples[call + 1])
        ratio = (log_prob - way.log_probs[call]).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rewards.mean().item()


def main(iterations: int = 20) -> tuple[float, float]:
    """Return the mean reward before and after."""
    torch.manual_seed(0)
    model, table = Velocity(), fastguide.flow_match_sde(SCHEDULE, 8, noise_level=0.7)
    pretrain(model)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    rewards = [improve(model, table, optimizer) for _ in range(iterations)]
    print(f"reward before {rewards[0]:.2f}, after {rewards[-1]:.2f}")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    main()
