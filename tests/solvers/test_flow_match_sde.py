"""The flow as a stochastic equation: Flow-GRPO's own formula, the flow's marginals, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import FlowSchedule, guided_step


def randn(seed):
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flow_grpo_s_own_formula():
    """The mean and the deviation of the paper's code, by each call's sigma, and that of the call after."""
    schedule = FlowSchedule(shift=3.0)
    table, sigmas = fastguide.flow_match_sde(schedule, 6, noise_level=0.7), schedule.steps(6).sigmas
    x, v, z = (randn(seed) for seed in range(3))
    for call in range(6):
        sigma, after = sigmas[call].item(), sigmas[call + 1].item()
        dt, below = after - sigma, 1 - (sigmas[1].item() if sigma == 1 else sigma)
        deviation = math.sqrt(sigma / below) * 0.7
        mean = x * (1 + deviation**2 / (2 * sigma) * dt) + v * (1 + deviation**2 * (1 - sigma) / (2 * sigma)) * dt
        got, original = torch.empty_like(x), torch.empty_like(x)
        guided_step(table, call, x, v, noise=z, out=got, original=original)
        torch.testing.assert_close(got, mean + deviation * math.sqrt(-dt) * z)
        torch.testing.assert_close(original, x - sigma * v)


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_samples_are_distributed_as_the_flow_s(noise_level):
    """Of Gaussian data, where the velocity is linear, the variance of each step is known; its error falls with dt."""

    def error(steps):
        visited = torch.linspace(0.95, 0.05, steps)
        table = fastguide.flow_match_sde(FlowSchedule(), sigmas=visited, noise_level=noise_level)
        row, variance = table.coefficients(), 0.05**2 * 0.25 + 0.95**2
        sigmas = [*table.levels.sigma.tolist(), 0.0]
        worst = 0.0
        for call in range(steps - 1):
            sigma, after = sigmas[call], sigmas[call + 1]
            velocity = (sigma - (1 - sigma) * 0.25) / ((1 - sigma) ** 2 * 0.25 + sigma**2)
            factor = row["out_sample"][call] + row["out_pred"][call] * velocity
            variance = factor.item() ** 2 * variance + row["out_noise"][call].item() ** 2
            worst = max(worst, abs(variance - ((1 - after) ** 2 * 0.25 + after**2)))
        return worst

    coarse, fine = error(100), error(400)
    assert fine < 0.02
    assert coarse / fine > 3


def test_a_flow_s_own_time_turns_its_velocity_round():
    there, back = (
        fastguide.flow_match_sde(FlowSchedule(invert_sigmas=invert), 5, noise_level=0.5) for invert in (False, True)
    )
    x, v, z = (randn(seed) for seed in range(3))
    torch.testing.assert_close(guided_step(there, 2, x, v, noise=z), guided_step(back, 2, x, -v, noise=z))


@pytest.mark.parametrize("level", [0, -1.0, math.inf, math.nan, "1", True])
def test_the_noise_level_is_checked(level):
    with pytest.raises(ValueError, match="noise_level: expected a number above 0"):
        fastguide.flow_match_sde(FlowSchedule(), 5, noise_level=level)


def test_a_schedule_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="schedule: expected a FlowSchedule, got NoiseSchedule"):
        fastguide.flow_match_sde(fastguide.NoiseSchedule.linear(), 5)
