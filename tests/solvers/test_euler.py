"""Euler's method over sigma and its ancestral form, against diffusers in float64, and its order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastguide
from fastguide import NoiseSchedule
from tests.support.convergence import slope
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

TABLES = {  # our arguments, diffusers' configuration
    "linspace": ({}, {}),
    "leading": (
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "trailing": ({"timestep_spacing": "trailing"}, {"timestep_spacing": "trailing"}),
    "karras": ({"sigma_spacing": "karras"}, {"use_karras_sigmas": True}),
    "exponential": ({"sigma_spacing": "exponential"}, {"use_exponential_sigmas": True}),
    "beta": ({"sigma_spacing": "beta"}, {"use_beta_sigmas": True}),
    "karras in given ends": (
        {"sigma_spacing": "karras", "sigma_min": 0.05, "sigma_max": 12.0},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    ),
    "final sigma_min": (
        {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"},
    ),
}
CHURNS = {
    "no churn": {},
    "churn": {"s_churn": 5.0, "s_noise": 1.003},
    "churn in a window": {"s_churn": 30.0, "s_tmin": 0.3, "s_tmax": 6.0},
}
STEPS = {"num_inference_steps": 20}


@pytest.mark.parametrize(
    ("prediction_type", "name", "churn"),
    itertools.product(["epsilon", "v_prediction", "sample"], TABLES, CHURNS),
)
def test_whole_loops_are_diffusers(prediction_type, name, churn):
    options, config = TABLES[name]
    table = fastguide.euler(SCHEDULE, 20, prediction_type=prediction_type, **options, **CHURNS[churn])
    config = {**BETAS, **config, "prediction_type": prediction_type}
    # diffusers draws before the last step too, which leads to the predicted x_0: nothing of it is left
    unused = churn == "churn" and prediction_type == "sample" and table.coefficients()["out_noise"][-1] == 0
    error = largest_error(table, "EulerDiscreteScheduler", config, STEPS, step=CHURNS[churn], draws_at_the_end=unused)
    assert error <= TOLERANCE


def test_continuous_timesteps_are_stable_video_diffusion_s():
    table = fastguide.euler(
        SCHEDULE, 20, prediction_type="v_prediction", timestep_type="continuous", sigma_spacing="karras",
        sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    config = {
        **BETAS, "prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True,
        "sigma_min": 0.002, "sigma_max": 700.0, "timestep_spacing": "leading", "steps_offset": 1,
    }  # fmt: skip
    assert largest_error(table, "EulerDiscreteScheduler", config, STEPS) <= TOLERANCE


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"timesteps": [900.0, 500.5, 20.0]}, {"timesteps": [900.0, 500.5, 20.0]}),
        ({"sigmas": [14.0, 3.0, 0.5, 0.0]}, {"sigmas": [14.0, 3.0, 0.5, 0.0]}),
        ({"sigmas": [3.0, 0.5, 0.1]}, {"sigmas": [3.0, 0.5, 0.1]}),
    ],
)
def test_given_timesteps_and_sigmas(ours, theirs):
    assert largest_error(fastguide.euler(SCHEDULE, **ours), "EulerDiscreteScheduler", BETAS, theirs) <= TOLERANCE


def test_a_schedule_without_signal_at_its_end_begins_at_a_finite_sigma():
    """As diffusers does: abar = 2^-24 there."""
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    for solver, name in ((fastguide.euler, "EulerDiscrete"), (fastguide.euler_ancestral, "EulerAncestralDiscrete")):
        table = solver(schedule, 20, **options)
        assert table.levels.sigma[0].item() == pytest.approx(4096, rel=1e-6)
        config = {**BETAS, **options, "rescale_betas_zero_snr": True}
        ancestral = solver is fastguide.euler_ancestral
        assert largest_error(table, f"{name}Scheduler", config, STEPS, draws_at_the_end=ancestral) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 7, 19])
def test_from_the_middle(begin):
    table = fastguide.euler(SCHEDULE, 20, sigma_spacing="karras")
    config = {**BETAS, "use_karras_sigmas": True}
    assert largest_error(table, "EulerDiscreteScheduler", config, STEPS, begin=begin) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
def test_ancestral_loops_are_diffusers(prediction_type, name):
    options, config = TABLES[name]
    table = fastguide.euler_ancestral(SCHEDULE, 20, prediction_type=prediction_type, **options)
    config = {**BETAS, **config, "prediction_type": prediction_type}
    error = largest_error(table, "EulerAncestralDiscreteScheduler", config, STEPS, draws_at_the_end=True)
    assert error <= TOLERANCE


@pytest.mark.parametrize("solver", [fastguide.euler, fastguide.euler_ancestral])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score"])
def test_every_prediction_of_one_slope_makes_the_same_step(solver, prediction_type, generator):
    table = solver(SCHEDULE, sigmas=[4.0, 1.5, 0.0], prediction_type=prediction_type)
    epsilon_table = solver(SCHEDULE, sigmas=[4.0, 1.5, 0.0])
    original, epsilon, noise = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    for call, sigma in enumerate((4.0, 1.5)):
        x, x_0 = original + sigma * epsilon, torch.empty_like(original)
        prediction = {
            "epsilon": epsilon,
            "sample": original,
            "v_prediction": (epsilon - sigma * original) / math.sqrt(1 + sigma**2),
            "score": -epsilon / sigma,
        }[prediction_type]
        got = fastguide.guided_step(table, call, x, prediction, noise=noise, original=x_0)
        torch.testing.assert_close(got, fastguide.guided_step(epsilon_table, call, x, epsilon, noise=noise))
        torch.testing.assert_close(x_0, original)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", [fastguide.euler, fastguide.euler_ancestral])
def test_the_gradient_moves_epsilon(solver, prediction_type, generator):
    table = solver(SCHEDULE, sigmas=[4.0, 1.5, 0.0], prediction_type=prediction_type)
    epsilon_table = solver(SCHEDULE, sigmas=[4.0, 1.5, 0.0])
    original, epsilon, gradient = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    x, moved = original + 4 * epsilon, epsilon - 4 * 2.5 * gradient
    prediction = {
        "epsilon": epsilon,
        "sample": original,
        "v_prediction": (epsilon - 4 * original) / math.sqrt(17),
    }[prediction_type]
    expected_0 = torch.empty_like(x)
    expected = fastguide.guided_step(epsilon_table, 0, x, moved, noise=epsilon, original=expected_0)
    for form in ("epsilon", "epsilon_after_clip"):
        x_0, guidance = torch.empty_like(x), fastguide.Classifier(guidance_scale=2.5, form=form)
        got = fastguide.guided_step(table, 0, x, prediction, guidance, gradient=gradient, noise=epsilon, original=x_0)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(x_0, expected_0 if form == "epsilon" else original)


def test_the_gradient_moves_the_mean_where_there_is_noise():
    ancestral = fastguide.euler_ancestral(SCHEDULE, sigmas=[4.0, 1.5, 0.0])
    up = 1.5 * math.sqrt(1 - (1.5 / 4) ** 2)
    assert ancestral.coefficients("mean")["out_grad"].tolist() == pytest.approx([up**2, 0.0])
    assert "no variance" in fastguide.euler(SCHEDULE, 5).unused_forms["mean"]
    assert not fastguide.euler(SCHEDULE, 5, s_churn=1.0).unused_forms


def test_its_order_is_one():
    """Of data N(0, 1): epsilon is sigma * x / (1 + sigma^2), and x stays in proportion to sqrt(1 + sigma^2)."""

    def error(steps):
        table = fastguide.euler(SCHEDULE, sigmas=torch.linspace(10, 0, steps + 1, dtype=torch.float64))
        x = torch.ones(1, 1, dtype=torch.float64)
        for call, sigma in enumerate(table.levels.sigma.tolist()):
            x = fastguide.guided_step(table, call, x, sigma / (1 + sigma**2) * x)
        return abs(x.item() - 1 / math.sqrt(101))

    assert slope(error, (100, 200, 400, 800)) == pytest.approx(1, abs=0.2)


def test_ancestral_samples_have_the_data_s_variance():
    """Of data N(0, 1), by the exact recursion of the variance: x' = a * x + up * z."""
    table = fastguide.euler_ancestral(SCHEDULE, 400, timestep_spacing="trailing")
    variance = 1 + table.levels.sigma[0].item() ** 2
    columns = {name: values.tolist() for name, values in table.coefficients().items()}
    for call, sigma in enumerate(table.levels.sigma.tolist()):
        factor = columns["out_sample"][call] + columns["out_pred"][call] * sigma / (1 + sigma**2)
        variance = factor**2 * variance + columns["out_noise"][call] ** 2
    assert variance == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigmas": [1.0, 2.0]}, ValueError, "sigmas: expected strictly falling values"),
        ({"sigmas": [1.0]}, ValueError, "sigmas: expected one dimension and at least 2 values"),
        ({"sigmas": [1.0, -1.0]}, ValueError, "sigmas: expected finite positive values"),
        ({"sigmas": "abc"}, TypeError, "sigmas: expected a tensor or a sequence of numbers"),
        ({"sigmas": [1.0, 0.0], "timesteps": [5.0]}, ValueError, "timesteps: expected None with sigmas="),
        ({"timesteps": [5.0], "sigma_spacing": "karras"}, ValueError, "sigma_spacing: expected None with timesteps="),
        ({"timesteps": [1000.0]}, ValueError, "timesteps: expected values from 0 to 999"),
        ({}, ValueError, "num_inference_steps: expected a number, or timesteps="),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps: expected a positive integer"),
        ({"num_inference_steps": 3, "timesteps": [5.0]}, ValueError, "num_inference_steps: expected 1"),
        ({"num_inference_steps": 5, "sigma_min": 0.1}, ValueError, "sigma_spacing: expected one with sigma_min="),
        ({"num_inference_steps": 5, "sigma_spacing": "lu"}, ValueError, "sigma_spacing: expected one of"),
        (
            {"num_inference_steps": 5, "sigma_spacing": "karras", "sigma_min": 20.0},
            ValueError,
            "sigma_min: expected a number from 0 on and below sigma_max",
        ),
        (
            {"num_inference_steps": 5, "sigma_spacing": "karras", "sigma_min": 0.001, "final_sigmas_type": "sigma_min"},
            ValueError,
            "sigmas: expected falling values",
        ),
        ({"num_inference_steps": 5, "final_sigmas_type": "none"}, ValueError, "final_sigmas_type: expected one of"),
        ({"num_inference_steps": 5, "timestep_type": "real"}, ValueError, "timestep_type: expected one of"),
        ({"num_inference_steps": 5, "timestep_spacing": "even"}, ValueError, "timestep_spacing: expected one of"),
        ({"num_inference_steps": 5, "prediction_type": "eps"}, ValueError, "prediction_type: expected one of"),
        (
            {"num_inference_steps": 5, "prediction_type": "flow_prediction"},
            ValueError,
            "prediction_type: 'flow_prediction' is epsilon - x_0 of flow matching",
        ),
        ({"num_inference_steps": 5, "s_churn": -1.0}, ValueError, "s_churn: expected a number from 0 on, got -1.0"),
        ({"num_inference_steps": 5, "s_noise": "1"}, ValueError, "s_noise: expected a number from 0 on, got '1'"),
        ({"num_inference_steps": 5, "s_tmin": 3.0, "s_tmax": 1.0}, ValueError, "s_tmax: expected a number from 3 on"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        fastguide.euler(SCHEDULE, **options)


def test_a_wrong_schedule_is_named():
    for solver in (fastguide.euler, fastguide.euler_ancestral):
        with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule, got FlowSchedule"):
            solver(fastguide.FlowSchedule(), 5)
