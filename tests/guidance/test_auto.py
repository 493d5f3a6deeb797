"""Autoguidance: a weaker model in the place of the unconditional prediction."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AutoGuidance, NoiseSchedule, Sampler, guided_step

TABLE = fastguide.ddim(NoiseSchedule.linear(), 8)


def strong(x, t, y=0.0, deep=None):
    parts = y if deep is None else y + deep["more"]
    return 0.3 * torch.tanh(x + torch.sin(t / 300).reshape(-1, 1) + torch.as_tensor(parts).reshape(-1, 1))


def weak(x, t, y=0.0, deep=None):
    return 0.5 * strong(x, t, y, deep) + 0.1


def randn():
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LABELS = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("named", [False, True])
def test_a_loop_calls_both_models(named):
    condition = {"y": LABELS, "deep": {"more": 2 * LABELS}} if named else LABELS
    sampler = Sampler(AutoGuidance.both(weak, strong), TABLE, AutoGuidance(2.5))
    got = sampler(randn(), cond=condition, uncond=condition)
    x = randn()
    for index, t in enumerate(TABLE.timesteps):
        times = torch.full((3,), float(t))
        given = (LABELS, {"more": 2 * LABELS}) if named else (LABELS,)
        first, second = (model(x, times, *given) for model in (weak, strong))
        x = guided_step(TABLE, index, x, first + 2.5 * (second - first))
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_it_takes_what_classifier_free_guidance_takes():
    guidance = AutoGuidance([1.0, 2.0, 3.0], guidance_rescale=0.5).within(TABLE, 0.5)
    assert (guidance.num_predictions, guidance.batch, guidance.steps) == (2, 3, 8)
    assert "AutoGuidance" in repr(AutoGuidance(2.0))
