"""Latent consistency, trajectory consistency and consistency models, against diffusers in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import NoiseSchedule
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = NoiseSchedule.scaled_linear()
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample_range", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_lcm_loops_are_diffusers(prediction_type, clip_sample_range, steps):
    table = fastguide.lcm(SCHEDULE, steps, prediction_type=prediction_type, clip_sample_range=clip_sample_range)
    config = {"prediction_type": prediction_type, "clip_sample": clip_sample_range is not None}
    assert largest_error(table, "LCMScheduler", config, {"num_inference_steps": steps}) <= TOLERANCE


@pytest.mark.parametrize(
    ("ours", "config", "theirs"),
    [
        ({"timesteps": [999, 500, 100]}, {}, {"timesteps": [999, 500, 100]}),
        ({"num_inference_steps": 6, "original_inference_steps": 100}, {}, {"num_inference_steps": 6}),
        ({"num_inference_steps": 4, "timestep_scaling": 0.01}, {"timestep_scaling": 0.01}, {"num_inference_steps": 4}),
    ],
)
def test_lcm_s_options(ours, config, theirs):
    if "original_inference_steps" in ours:
        theirs = {**theirs, "original_inference_steps": ours["original_inference_steps"]}
    assert largest_error(fastguide.lcm(SCHEDULE, **ours), "LCMScheduler", config, theirs) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd_loops_are_diffusers(prediction_type, eta, steps):
    table = fastguide.tcd(SCHEDULE, steps, eta=eta, prediction_type=prediction_type)
    config = {"prediction_type": prediction_type}
    error = largest_error(table, "TCDScheduler", config, {"num_inference_steps": steps}, step={"eta": eta})
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_without_signal_at_the_end(name):
    solver = getattr(fastguide, name.lower())
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    table = solver(schedule, 4, prediction_type="v_prediction")
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert largest_error(table, f"{name}Scheduler", config, {"num_inference_steps": 4}) <= TOLERANCE
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of x_0 at timestep 999"):
        solver(schedule, 4)


@pytest.mark.parametrize("solver", [fastguide.lcm, fastguide.tcd])
def test_the_gradient_moves_epsilon(solver, generator):
    table = solver(SCHEDULE, 4)
    x, epsilon, gradient = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    sigma = table.levels.sigma[1].item()
    expected = fastguide.guided_step(table, 1, x, epsilon - sigma * 2.5 * gradient, noise=x)
    for form in ("epsilon", "epsilon_after_clip"):
        guidance = fastguide.Classifier(guidance_scale=2.5, form=form)
        got = fastguide.guided_step(table, 1, x, epsilon, guidance, gradient=gradient, noise=x)
        torch.testing.assert_close(got, expected)
    mean = table.coefficients("mean")
    torch.testing.assert_close(mean["out_grad"], mean["out_noise"] ** 2)


def test_a_jump_over_a_whole_number_of_timesteps_is_exact():
    """0.7 * 90 is 62.99999999999999 in float64, and 63 in diffusers' float32."""
    table = fastguide.tcd(SCHEDULE, timesteps=[500, 90, 5], eta=0.3)
    abar = SCHEDULE.alphas_cumprod
    expected = (1 - abar[90] / abar[63]).sqrt().item()
    assert table.coefficients()["out_noise"][0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("clip_sample_range", [None, 1.0])
@pytest.mark.parametrize("given", [{"num_inference_steps": 1}, {"num_inference_steps": 5}, {"timesteps": [22, 0]}])
def test_consistency_loops_are_diffusers(clip_sample_range, given):
    table = fastguide.consistency(**given, clip_sample_range=clip_sample_range)
    config = {"clip_denoised": clip_sample_range is not None}
    error = largest_error(table, "CMStochasticIterativeScheduler", config, given, draws_at_the_end=len(table) > 1)
    assert error <= TOLERANCE


def test_consistency_s_options():
    options = {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0, "rho": 5.0, "s_noise": 1.1}
    table = fastguide.consistency(5, num_train_timesteps=30, **options)
    config = {**options, "num_train_timesteps": 30}
    error = largest_error(
        table, "CMStochasticIterativeScheduler", config, {"num_inference_steps": 5}, draws_at_the_end=True
    )
    assert error <= TOLERANCE
    assert table.levels.sigma[0].item() == pytest.approx(20.0)
    assert table.first_in_scale == pytest.approx(1 / math.sqrt(401))
    assert "no epsilon to shift" in table.unused_forms["epsilon"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastguide.lcm(SCHEDULE), "num_inference_steps: expected a number, or timesteps=, got None"),
        (lambda: fastguide.lcm(SCHEDULE, 51), "num_inference_steps: expected at most original_inference_steps = 50"),
        (lambda: fastguide.lcm(SCHEDULE, 4, original_inference_steps=1001), "original_inference_steps: expected at"),
        (lambda: fastguide.lcm(SCHEDULE, 4, timestep_scaling=0), "timestep_scaling: expected a number above 0, got 0"),
        (lambda: fastguide.lcm(SCHEDULE, 4, clip_sample_range=-1), "clip_sample_range: expected a positive number"),
        (lambda: fastguide.lcm(SCHEDULE, timesteps=[5, 7]), "timesteps: expected strictly falling values"),
        (lambda: fastguide.lcm(SCHEDULE, 4, prediction_type="flow_prediction"), "prediction_type: 'flow_prediction'"),
        (lambda: fastguide.tcd(SCHEDULE, 4, eta=1.5), "eta: expected a number from 0 to 1, got 1.5"),
        (lambda: fastguide.tcd(SCHEDULE, 4, eta=True), "eta: expected a number from 0 to 1, got True"),
        (lambda: fastguide.consistency(), "num_inference_steps: expected a number, or timesteps=, got None"),
        (lambda: fastguide.consistency(41), "num_inference_steps: expected at most num_train_timesteps = 40, got 41"),
        (lambda: fastguide.consistency(timesteps=[40, 0]), "timesteps: expected whole numbers from 0 to 39"),
        (lambda: fastguide.consistency(timesteps=[0, 22]), "timesteps: expected .* values"),
        (lambda: fastguide.consistency(2, timesteps=[5]), "num_inference_steps: expected 1, got 2"),
        (lambda: fastguide.consistency(2, sigma_min=0.0), "sigma_min: expected a number above 0 to 80, got 0.0"),
        (lambda: fastguide.consistency(2, clip_sample_range=0), "clip_sample_range: expected a number above 0"),
        (lambda: fastguide.consistency(2, num_train_timesteps=1), "num_train_timesteps: expected an integer from 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_schedule_is_named():
    for solver in (fastguide.lcm, fastguide.tcd):
        with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule, got str"):
            solver("linear", 4)
