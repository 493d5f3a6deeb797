"""Flow matching in training: noised samples, targets, conversions and the loss, against formulas written out here."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastguide
from fastguide.schedules import FlowSchedule
from tests.support.cases import PREDICTION_TYPES, SCHEDULE

FLOW = FlowSchedule(shift=3.0)
TYPES = (*PREDICTION_TYPES, "flow_prediction")
INDICES = torch.tensor([0, 20, 500, 998])


@pytest.fixture
def data(generator):
    return torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)


def sigma_of(index):
    plain = (index.double() + 1) / 1000
    return (3 * plain / (1 + 2 * plain)).reshape(-1, 1, 1)


def all_predictions(original, epsilon, sigma):
    alpha = 1 - sigma
    r = (alpha**2 + sigma**2).sqrt()
    return {
        "epsilon": epsilon,
        "sample": original,
        "v_prediction": (alpha * epsilon - sigma * original) / r,
        "score": -epsilon / sigma,
        "flow_prediction": epsilon - original,
    }


def test_noised_samples_and_targets(data):
    original, epsilon = data
    sigma = sigma_of(INDICES)
    x = fastguide.add_noise(FLOW, original, INDICES, epsilon)
    torch.testing.assert_close(x, (1 - sigma) * original + sigma * epsilon, rtol=1e-13, atol=1e-13)
    for kind, expected in all_predictions(original, epsilon, sigma).items():
        got = fastguide.training_target(FLOW, original, INDICES, epsilon, kind)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, repeat=2)))
def test_every_conversion(source, target, data):
    original, epsilon = data
    sigma = sigma_of(INDICES)
    predictions = all_predictions(original, epsilon, sigma)
    x = (1 - sigma) * original + sigma * epsilon
    got = fastguide.convert_prediction(FLOW, x, INDICES, predictions[source], source, target)
    torch.testing.assert_close(got, predictions[target], rtol=1e-9, atol=1e-9)


def test_the_loss_of_a_perfect_model_is_zero_and_it_is_told_real_timesteps():
    original = torch.ones(64, 3)
    told = []

    def perfect(x, t):
        told.append(t)
        sigma = t[:, None] / 1000
        return (x - original) / sigma

    loss = fastguide.denoising_loss(perfect, FLOW, original, prediction_type="flow_prediction")
    assert loss < 1e-6
    assert told[0].dtype == torch.float32
    assert 0 < told[0].min() < 300 < 900 < told[0].max() <= 1000


def test_flow_prediction_needs_a_flow():
    x = torch.zeros(1, 3)
    calls = [
        lambda: fastguide.ddim(SCHEDULE, 10, prediction_type="flow_prediction"),
        lambda: fastguide.ddpm(SCHEDULE, 10, prediction_type="flow_prediction"),
        lambda: fastguide.training_target(SCHEDULE, x, 5, x, "flow_prediction"),
        lambda: fastguide.convert_prediction(SCHEDULE, x, 5, x, "flow_prediction", "sample"),
        lambda: fastguide.convert_prediction(SCHEDULE, x, 5, x, "sample", "flow_prediction"),
        lambda: fastguide.convert_prediction(SCHEDULE, x, 5, x, "flow_prediction", "flow_prediction"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"prediction_type: 'flow_prediction' is epsilon - x_0 of flow matching"):
            call()


def test_epsilon_says_nothing_where_a_flow_has_no_signal():
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="timestep: expected one at which convert_prediction is defined, got 999"):
        fastguide.convert_prediction(FLOW, x, 999, x, "epsilon", "flow_prediction")
    with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule, a FlowSchedule or Levels, got str"):
        fastguide.add_noise("flow", x, 5, x)
