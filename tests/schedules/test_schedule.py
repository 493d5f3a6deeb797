"""Noise schedules and timesteps, against formulas written out here and against diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastguide import NoiseSchedule
from fastguide.schedules import Levels
from fastguide.schedules.predictions import convert, from_original_and_epsilon

diffusers = pytest.importorskip("diffusers")


def test_linear_and_scaled_linear_and_sigmoid_betas():
    for schedule, betas in (
        (NoiseSchedule.linear(100, beta_start=0.001, beta_end=0.1), np.linspace(0.001, 0.1, 100)),
        (
            NoiseSchedule.scaled_linear(100, beta_start=0.001, beta_end=0.1),
            np.linspace(0.001**0.5, 0.1**0.5, 100) ** 2,
        ),
        (
            NoiseSchedule.sigmoid(100, beta_start=0.001, beta_end=0.1),
            0.099 / (1 + np.exp(-np.linspace(-6, 6, 100))) + 0.001,
        ),
    ):
        np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)


def test_cosine_is_nichol_and_dhariwal_s():
    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = NoiseSchedule.cosine(50)
    product = 1.0
    for i in range(50):
        product *= 1 - min(1 - f((i + 1) / 50) / f(i / 50), 0.999)
        assert schedule.alphas_cumprod[i].item() == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (NoiseSchedule.linear(), "linear"),
        (NoiseSchedule.scaled_linear(beta_start=1e-4, beta_end=0.02), "scaled_linear"),
        (NoiseSchedule.cosine(), "squaredcos_cap_v2"),
        (NoiseSchedule.sigmoid(), "sigmoid"),
    ],
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedule_is_diffusers_up_to_its_float32(ours, name, zero_snr):
    theirs = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    if zero_snr:
        ours = ours.rescale_zero_terminal_snr()
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)


def test_zero_terminal_snr_keeps_the_first_and_zeroes_the_last():
    before = NoiseSchedule.scaled_linear()
    after = before.rescale_zero_terminal_snr()
    assert after.alphas_cumprod[-1] == 0
    assert after.alphas_cumprod[0].item() == pytest.approx(before.alphas_cumprod[0].item(), rel=1e-14)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 27, 50, 333, 999, 1000])
@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_timesteps_are_diffusers(scheduler, spacing, steps):
    theirs = scheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert NoiseSchedule.linear().timesteps(steps, spacing).tolist() == theirs.timesteps.tolist()


def test_steps_offset_moves_leading_timesteps():
    assert NoiseSchedule.linear().timesteps(4, steps_offset=1).tolist() == [751, 501, 251, 1]


def test_from_alphas_cumprod_copies_what_it_is_given():
    values = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = NoiseSchedule.from_alphas_cumprod(values)
    values[0] = 0.0
    assert schedule.alphas_cumprod.tolist() == [0.9, 0.5, 0.1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NoiseSchedule.linear(0), "num_train_timesteps: expected a positive integer, got 0"),
        (
            lambda: NoiseSchedule.linear(beta_start=-0.1),
            r"betas: expected every value in \(0, 1\], got values from -0.1",
        ),
        (lambda: NoiseSchedule.from_betas([]), "betas: expected one dimension"),
        (lambda: NoiseSchedule.from_betas([0.1, math.nan]), "betas: expected every value"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.9, 1.0]), r"alphas_cumprod: expected every value in \[0, 1\)"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.6]), "alphas_cumprod: .* got a rise at index 1"),
        (lambda: NoiseSchedule.from_alphas_cumprod(torch.rand(2, 2)), r"one dimension .* got \(2, 2\)"),
        (lambda: NoiseSchedule.linear().timesteps(1001), "num_inference_steps: expected at most .* 1000, got 1001"),
        (lambda: NoiseSchedule.linear().timesteps(5, "even"), "timestep_spacing: expected one of .* got 'even'"),
        (lambda: NoiseSchedule.linear().timesteps(1000, steps_offset=1), "timesteps: expected values from 0 to 999"),
        (lambda: NoiseSchedule.linear().check_timesteps([5, 5]), "timesteps: expected strictly falling"),
        (lambda: NoiseSchedule.linear().check_timesteps([1000]), "timesteps: expected values from 0 to 999"),
        (lambda: NoiseSchedule.linear().check_timesteps([3.0]), "timesteps: expected integers"),
    ],
)
def test_bad_schedules_are_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_levels_are_the_roots_of_abar_and_its_rest():
    schedule = NoiseSchedule.cosine()
    alpha, sigma = schedule.levels
    torch.testing.assert_close(alpha.square(), schedule.alphas_cumprod, rtol=1e-15, atol=0)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=1e-15, atol=0)


@pytest.mark.parametrize("levels", ["variance-preserving", "flow", "edm"])
def test_predictions_agree_at_any_level(levels):
    """One x_0 and one epsilon, predicted in every type, converted to every other: the definitions, at random levels."""
    sigma = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    alpha = {"variance-preserving": (1 - sigma**2).sqrt(), "flow": 1 - sigma, "edm": torch.ones_like(sigma)}[levels]
    x_0, epsilon = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, r = alpha * x_0 + sigma * epsilon, (alpha**2 + sigma**2).sqrt()
    truth = {
        "epsilon": epsilon,
        "sample": x_0,
        "v_prediction": (alpha * epsilon - sigma * x_0) / r,
        "score": -epsilon / sigma,
    }
    for source in truth:
        for target in truth:
            scale, of_x, of_prediction = convert(source, target, Levels(alpha, sigma))
            got = scale * (of_x * x + of_prediction * truth[source])
            torch.testing.assert_close(got, truth[target], rtol=1e-12, atol=1e-12)
        of_original, of_epsilon = from_original_and_epsilon(source, Levels(alpha, sigma))
        torch.testing.assert_close(of_original * x_0 + of_epsilon * epsilon, truth[source], rtol=1e-12, atol=1e-12)
