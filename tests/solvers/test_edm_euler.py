"""EDM's Euler steps, against diffusers in float64, and their order."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from tests.support.convergence import slope
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

STEPS = {"num_inference_steps": 20}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_spacing", ["karras", "exponential"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("churn", [{}, {"s_churn": 8.0, "s_noise": 1.007, "s_tmin": 0.05, "s_tmax": 50.0}])
def test_whole_loops_are_diffusers(prediction_type, sigma_spacing, final_sigmas_type, churn):
    options = {"prediction_type": prediction_type, "final_sigmas_type": final_sigmas_type}
    table = fastguide.edm_euler(20, sigma_spacing=sigma_spacing, **options, **churn)
    config = {**options, "sigma_schedule": sigma_spacing}
    assert largest_error(table, "EDMEulerScheduler", config, STEPS, step=churn) <= TOLERANCE


def test_other_data_and_from_the_middle():
    table = fastguide.edm_euler(20, sigma_min=0.01, sigma_max=20.0, sigma_data=1.0, rho=5.0)
    config = {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0, "rho": 5.0}
    for begin in (0, 7):
        assert largest_error(table, "EDMEulerScheduler", config, STEPS, begin=begin) <= TOLERANCE


def test_given_sigmas_are_the_sigmas():
    table = fastguide.edm_euler(sigmas=[10.0, 2.0, 0.0])
    assert table.levels.sigma.tolist() == [10.0, 2.0]
    assert table.init_noise_sigma == math.hypot(10.0, 1.0)
    assert table.in_scales[:2] == (1 / math.sqrt(100.25), 1 / math.sqrt(4.25))


def test_the_gradient_moves_epsilon(generator):
    """x_0 moves by sigma^2 * s * g, and the slope with it."""
    table = fastguide.edm_euler(sigmas=[10.0, 2.0, 0.0])
    x, prediction, gradient = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    x_0 = 0.25 / 100.25 * x + 5 / math.sqrt(100.25) * prediction + 100 * 2.5 * gradient
    expected = x + (2 - 10) * (x - x_0) / 10
    for form in ("epsilon", "epsilon_after_clip"):
        guidance = fastguide.Classifier(guidance_scale=2.5, form=form)
        torch.testing.assert_close(
            fastguide.guided_step(table, 0, x, prediction, guidance, gradient=gradient), expected
        )


def test_its_order_is_one():
    """Of data N(0, 1/4), where the best network predicts 0: x stays in proportion to sqrt(1/4 + sigma^2)."""

    def error(steps):
        table = fastguide.edm_euler(sigmas=torch.linspace(10, 0, steps + 1, dtype=torch.float64))
        x = torch.ones(1, 1, dtype=torch.float64)
        for call in range(steps):
            x = fastguide.guided_step(table, call, x, torch.zeros_like(x))
        return abs(x.item() - 0.5 / math.sqrt(100.25))

    assert slope(error, (200, 400, 800, 1600)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_inference_steps: expected a number, or sigmas=, got None"),
        ({"num_inference_steps": 5, "sigma_spacing": "beta"}, "sigma_spacing: expected one of .* got 'beta'"),
        ({"num_inference_steps": 5, "prediction_type": "sample"}, "prediction_type: expected one of .* got 'sample'"),
        ({"num_inference_steps": 5, "sigma_data": 0}, "sigma_data: expected a number above 0, got 0"),
        ({"num_inference_steps": 5, "sigma_min": 90.0}, "sigma_min: expected a number above 0 to 80, got 90.0"),
        ({"num_inference_steps": 5, "rho": 0}, "rho: expected a number above 0, got 0"),
        ({"num_inference_steps": 5, "final_sigmas_type": "one"}, "final_sigmas_type: expected one of"),
        ({"sigmas": [1.0, 2.0]}, "sigmas: expected strictly falling values"),
        ({"sigmas": [2.0, 1.0], "num_inference_steps": 3}, "num_inference_steps: expected 1, got 3"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastguide.edm_euler(**options)
