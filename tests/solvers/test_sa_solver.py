"""SA-Solver, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAME = "SASolverScheduler"
ORDERS = [(predictor, corrector) for predictor in (1, 2, 3) for corrector in (1, 2, 3, 4)]


def some_noise(timestep):
    return 0.3 + timestep / 2000


def error(ours, theirs, steps=20, *, schedule=SCHEDULE, options=None, begin=0):
    """diffusers draws at every call, also where tau is 0."""
    options = options or {}
    table = fastguide.sa_solver(schedule, steps, **options, **ours, begin=begin)
    unused = [call for call, adds in enumerate(table.adds_noise) if not adds]
    config = {**BETAS, **options, **theirs}
    return largest_error(table, NAME, config, {"num_inference_steps": steps}, begin=begin, unused_draws=unused)


@pytest.mark.parametrize("tau_func", [None, some_noise, lambda timestep: 0])
@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize(("predictor_order", "corrector_order"), ORDERS)
def test_whole_loops_are_diffusers(predictor_order, corrector_order, algorithm_type, tau_func):
    options = {
        "predictor_order": predictor_order, "corrector_order": corrector_order, "algorithm_type": algorithm_type,
        "tau_func": tau_func,
    }  # fmt: skip
    for steps in (20, 5):
        assert error({}, {}, steps, options=options) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("lower_order_final", [False, True])
def test_predictions_and_full_order_at_the_end(prediction_type, lower_order_final):
    options = {"prediction_type": prediction_type, "lower_order_final": lower_order_final}
    assert error({}, {}, options=options) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_every_spacing(spacing):
    assert error({"sigma_spacing": spacing}, {f"use_{spacing}_sigmas": True}) <= TOLERANCE


def test_flows_and_a_later_beginning():
    theirs = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    assert error({}, theirs, schedule=fastguide.FlowSchedule(shift=3.0)) <= TOLERANCE
    for begin in (1, 7, 19):
        assert error({}, {}, begin=begin) <= TOLERANCE
