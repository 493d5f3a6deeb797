"""What guidance asks of training."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from tests.support.cases import PREDICTION_TYPES, SCHEDULE


def test_drop_condition_drops_the_share_it_is_told(generator):
    """Within five standard deviations of the binomial; whole samples, never parts of one."""
    condition, null = torch.ones(20_000, 3), torch.tensor([5.0, 6.0, 7.0])
    for p in (0.1, 0.2):
        out = fastguide.drop_condition(condition, null, p, generator=generator)
        dropped = (out == null).all(1)
        assert torch.equal(dropped, ~(out == condition).all(1))
        assert abs(dropped.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 20_000)


def test_drop_condition_with_0_and_1():
    labels = torch.arange(6)
    assert torch.equal(fastguide.drop_condition(labels, torch.tensor(9), 0.0), labels)
    assert (fastguide.drop_condition(labels, torch.tensor(9), 1.0) == 9).all()
    assert torch.equal(labels, torch.arange(6))


def test_condition_dropout_trains_its_null_condition_and_leaves_evaluation_alone():
    dropout = fastguide.ConditionDropout((3,), p_uncond=0.5)
    condition = torch.randn(50, 3)
    assert torch.equal(dropout.eval()(condition), condition)
    torch.manual_seed(0)
    out = dropout.train()(condition)
    dropped = (out != condition).any(1)
    assert 0 < dropped.sum() < 50
    out.sum().backward()
    assert dropout.null_condition.grad.tolist() == [dropped.sum().item()] * 3
    assert torch.equal(dropout.null(2), dropout.null_condition.expand(2, 3))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_denoising_loss_is_zero_for_the_true_prediction(prediction_type):
    """A model that knows x_0 solves for what it is asked, at whatever timesteps are drawn."""
    original = torch.randn(64, 5, dtype=torch.float64)

    def model(x, t):
        a = SCHEDULE.alphas_cumprod[t][:, None]
        epsilon = (x - a.sqrt() * original) / (1 - a).sqrt()
        return {
            "epsilon": epsilon,
            "sample": original,
            "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * original,
            "score": -epsilon / (1 - a).sqrt(),
        }[prediction_type]

    loss = fastguide.denoising_loss(model, SCHEDULE, original, prediction_type=prediction_type)
    assert loss.item() < 1e-18


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_denoising_loss_serves_a_schedule_with_zero_terminal_signal(prediction_type):
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    original = torch.randn(2000, 3)
    loss = fastguide.denoising_loss(
        lambda x, t: torch.zeros_like(x), schedule, original, prediction_type=prediction_type
    )
    assert loss.item() == pytest.approx(1.0, abs=0.1)


def test_denoising_loss_of_nothing_is_the_noise_s_variance(generator):
    loss = fastguide.denoising_loss(
        lambda x, t: torch.zeros_like(x), SCHEDULE, torch.ones(1000, 50), generator=generator
    )
    assert loss.item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / 50_000))


def test_losses_reach_every_timestep_and_the_parameters(generator):
    seen = []
    linear = torch.nn.Linear(5, 3)

    def classifier(x, t):
        seen.append(t)
        return linear(x)

    labels = torch.randint(3, (5000,), generator=generator)
    loss = fastguide.classifier_loss(classifier, SCHEDULE, torch.randn(5000, 5), labels, generator=generator)
    loss.backward()
    assert linear.weight.grad.abs().sum() > 0
    assert seen[0].min() < 10
    assert seen[0].max() > 989


def test_classifier_loss_is_the_cross_entropy_of_noised_data():
    """Of a classifier that reads the signal x_0 = +-1 with Bayes' rule, on data of two points: its known value."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (200_000,), generator=generator)
    original = labels[:, None] * 2.0 - 1

    def bayes(x, t):
        a = SCHEDULE.alphas_cumprod[t][:, None].float()
        logit = 2 * a.sqrt() * x / (1 - a)
        return torch.cat([torch.zeros_like(logit), logit], 1)

    loss = fastguide.classifier_loss(bayes, SCHEDULE, original, labels, generator=generator)
    a = SCHEDULE.alphas_cumprod
    mean, std = 2 * a / (1 - a), 2 * (a / (1 - a)).sqrt()  # of the logit given the label, per timestep
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    expected = (torch.nn.functional.softplus(-(mean[:, None] + std[:, None] * z)) * density).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=0.01)
