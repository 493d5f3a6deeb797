"""Training at levels of one's own, such as EDM's unscaled samples, against formulas written out here."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastguide
from fastguide.schedules import Levels
from tests.support.cases import PREDICTION_TYPES

SIGMAS = torch.tensor([80.0, 14.6, 1.0, 0.03], dtype=torch.float64)
UNSCALED = Levels.variance_exploding(SIGMAS)
INDICES = torch.tensor([2, 0, 3, 1])


@pytest.fixture
def data(generator):
    return torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)


def all_predictions(original, epsilon):
    sigma = SIGMAS[INDICES].reshape(-1, 1, 1)
    return {
        "epsilon": epsilon,
        "sample": original,
        "v_prediction": (epsilon - sigma * original) / (1 + sigma**2).sqrt(),
        "score": -epsilon / sigma,
    }


def test_noised_samples_and_targets_of_unscaled_samples(data):
    original, epsilon = data
    x = fastguide.add_noise(UNSCALED, original, INDICES, epsilon)
    torch.testing.assert_close(x, original + SIGMAS[INDICES].reshape(-1, 1, 1) * epsilon, rtol=1e-13, atol=1e-13)
    for kind, expected in all_predictions(original, epsilon).items():
        got = fastguide.training_target(UNSCALED, original, INDICES, epsilon, kind)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTION_TYPES, repeat=2)))
def test_every_conversion_of_unscaled_samples(source, target, data):
    original, epsilon = data
    predictions = all_predictions(original, epsilon)
    x = original + SIGMAS[INDICES].reshape(-1, 1, 1) * epsilon
    got = fastguide.convert_prediction(UNSCALED, x, INDICES, predictions[source], source, target)
    torch.testing.assert_close(got, predictions[target], rtol=1e-9, atol=1e-9)


def test_the_model_is_told_sigma():
    original, told = torch.ones(64, 3), []

    def perfect(x, t):
        told.append(t)
        return (x - original) / t[:, None]

    assert fastguide.denoising_loss(perfect, UNSCALED, original) < 1e-8
    assert told[0].dtype == torch.float32
    assert set(told[0].tolist()) == set(SIGMAS.float().tolist())


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (Levels(SIGMAS, SIGMAS[:2]), r"schedule: expected levels of one shape \(levels,\), got \(4,\) and \(2,\)"),
        (Levels(SIGMAS[0], SIGMAS[0]), r"schedule: expected levels of one shape"),
        (Levels.variance_exploding(-SIGMAS), "schedule: expected a finite sigma from 0 on"),
        (Levels(SIGMAS * torch.inf, SIGMAS), "schedule: expected a finite alpha from 0 on"),
    ],
)
def test_levels_that_are_none(levels, message):
    with pytest.raises(ValueError, match=message):
        fastguide.add_noise(levels, torch.ones(4, 3), INDICES, torch.ones(4, 3))


def test_velocity_needs_a_flow():
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"prediction_type: 'flow_prediction' is epsilon - x_0 of flow matching"):
        fastguide.training_target(UNSCALED, x, INDICES, x, "flow_prediction")
