"""Euler's method for flow matching, against diffusers in float64, and its order on a flow with a known solution."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide.schedules import FlowSchedule
from tests.schedules.test_sigmas import FLOWS, flow_schedule
from tests.support.convergence import slope
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

NAME = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_whole_loops_are_diffusers(name, stochastic):
    config, arguments = FLOWS[name]
    if stochastic and config.get("invert_sigmas"):
        pytest.skip("diffusers' stochastic step takes the inverted sigma for the noise's share")
    table = fastguide.flow_match_euler(flow_schedule(config), **arguments, stochastic=stochastic)
    config = {**config, "stochastic_sampling": stochastic}
    error = largest_error(table, NAME, config, arguments, draws_at_the_end=stochastic)
    assert error <= TOLERANCE


def test_from_the_middle():
    table = fastguide.flow_match_euler(FlowSchedule(shift=3.0), 20)
    assert largest_error(table, NAME, {"shift": 3.0}, {"num_inference_steps": 20}, begin=7) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score", "flow_prediction"])
def test_every_prediction_of_one_velocity_makes_the_same_step(prediction_type, generator):
    """From the levels' own definition: x_0 and epsilon are known, and so is what a model of each kind says."""
    schedule = FlowSchedule()
    sigmas = [0.9, 0.5, 0.2]
    original, epsilon = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator)
    table = fastguide.flow_match_euler(schedule, sigmas=sigmas, prediction_type=prediction_type)
    for call, (now, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        alpha, r = 1 - now, ((1 - now) ** 2 + now**2) ** 0.5
        prediction = {
            "epsilon": epsilon,
            "sample": original,
            "v_prediction": (alpha * epsilon - now * original) / r,
            "score": -epsilon / now,
            "flow_prediction": epsilon - original,
        }[prediction_type]
        x_0 = torch.empty_like(original)
        x = fastguide.guided_step(table, call, alpha * original + now * epsilon, prediction, original=x_0)
        torch.testing.assert_close(x, (1 - after) * original + after * epsilon, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_0, original, rtol=1e-12, atol=1e-12)


def test_the_inverted_time_is_the_same_flow():
    """A model of time 1 - sigma predicts x_0 - epsilon: the same samples, and the same x_0."""
    plain = fastguide.flow_match_euler(FlowSchedule(), 5)
    inverted = fastguide.flow_match_euler(FlowSchedule(invert_sigmas=True), 5)
    torch.testing.assert_close(inverted.timesteps, 1000 - plain.timesteps)
    x, velocity = torch.randn(2, 2, 3, dtype=torch.float64)
    for call in range(5):
        both = torch.empty(2, *x.shape, dtype=torch.float64)
        a = fastguide.guided_step(plain, call, x, velocity, original=both[0])
        b = fastguide.guided_step(inverted, call, x, -velocity, original=both[1])
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(both[0], both[1])


def test_the_gradient_moves_epsilon(generator):
    """epsilon becomes epsilon - sigma * s * g, and the velocity (epsilon - x) / (1 - sigma) with it."""
    table = fastguide.flow_match_euler(FlowSchedule(), sigmas=[0.8, 0.4])
    x, velocity, gradient = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    moved = velocity - 0.8 * 2.5 * gradient / 0.2
    x_0 = torch.empty_like(x)
    for form in ("epsilon", "epsilon_after_clip"):
        guidance = fastguide.Classifier(guidance_scale=2.5, form=form)
        got = fastguide.guided_step(table, 0, x, velocity, guidance, gradient=gradient, original=x_0)
        torch.testing.assert_close(got, x + (0.4 - 0.8) * moved)
    guidance = fastguide.Classifier(guidance_scale=2.5, form="epsilon")
    fastguide.guided_step(table, 0, x, velocity, guidance, gradient=gradient, original=x_0)
    torch.testing.assert_close(x_0, x - 0.8 * moved)
    stochastic = fastguide.flow_match_euler(FlowSchedule(), sigmas=[0.8, 0.4], stochastic=True)
    got = fastguide.guided_step(stochastic, 0, x, velocity, guidance, gradient=gradient, noise=x)
    torch.testing.assert_close(got, 0.6 * (x - 0.8 * moved) + 0.4 * x)


def test_a_gradient_has_no_use_where_there_is_no_signal():
    assert "zero signal" in fastguide.flow_match_euler(FlowSchedule(), 5).unused_forms["epsilon"]
    assert "no variance" in fastguide.flow_match_euler(FlowSchedule(), 5).unused_forms["mean"]


def test_its_order_is_one():
    """Of data N(0, 1/4): the velocity is linear in x, and x(sigma) stays in proportion to the deviation."""

    def deviation(sigma):
        return ((1 - sigma) ** 2 / 4 + sigma**2) ** 0.5

    def error(steps):
        table = fastguide.flow_match_euler(FlowSchedule(), sigmas=torch.linspace(1, 0, steps + 1).double()[:-1])
        x = torch.ones(1, 1, dtype=torch.float64)
        for call, sigma in enumerate(table.levels.sigma.tolist()):
            slope_of_deviation = (sigma - (1 - sigma) / 4) / deviation(sigma) ** 2
            x = fastguide.guided_step(table, call, x, slope_of_deviation * x, backend="reference")
        return abs(x.item() - deviation(0.0) / deviation(1.0))

    assert slope(error, (40, 80, 160, 320)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fastguide.flow_match_euler(fastguide.NoiseSchedule.linear(), 5),
            TypeError,
            "schedule: expected a Flow",
        ),
        (lambda: fastguide.flow_match_euler(FlowSchedule(), 5, stochastic=1), TypeError, "stochastic: expected True"),
        (
            lambda: fastguide.flow_match_euler(FlowSchedule(), 5, prediction_type="epsilon"),
            ValueError,
            "prediction_type: 'epsilon' says nothing of x_0 at timestep 1000",
        ),
        (
            lambda: fastguide.flow_match_euler(FlowSchedule(), 5, prediction_type="velocity"),
            ValueError,
            "prediction_type: expected one of .* got 'velocity'",
        ),
        (
            lambda: fastguide.flow_match_euler(FlowSchedule(), sigmas=[0.2, 0.4]),
            ValueError,
            "sigmas: expected strictly",
        ),
        (lambda: fastguide.flow_match_euler(FlowSchedule()), ValueError, "num_inference_steps: expected a number"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
