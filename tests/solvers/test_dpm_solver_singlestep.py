"""Singlestep DPM-Solver, against diffusers in float64."""

from __future__ import annotations

import itertools

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAME = "DPMSolverSinglestepScheduler"
TYPES = [
    (algorithm_type, solver_order, solver_type)
    for algorithm_type, solver_order, solver_type in itertools.product(
        ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"], [1, 2, 3], ["midpoint", "heun"]
    )
    if not (algorithm_type == "sde-dpmsolver++" and solver_order == 3)
]


def error(ours, theirs, steps=20, *, schedule=SCHEDULE, options=None, begin=0):
    options = {"lower_order_final": True, **(options or {})}
    table = fastguide.dpm_solver_singlestep(schedule, steps, **options, **ours, begin=begin)
    unused = options.get("algorithm_type", "").startswith("sde") and not table.adds_noise[-1]
    config = {**BETAS, **options, **theirs}
    return largest_error(table, NAME, config, {"num_inference_steps": steps}, begin=begin, draws_at_the_end=unused)


@pytest.mark.parametrize("steps", [18, 19, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("algorithm_type", "solver_order", "solver_type"), TYPES)
def test_whole_loops_are_diffusers(algorithm_type, solver_order, solver_type, prediction_type, steps):
    options = {
        "algorithm_type": algorithm_type, "solver_order": solver_order, "solver_type": solver_type,
        "prediction_type": prediction_type,
        "final_sigmas_type": "sigma_min" if algorithm_type == "dpmsolver" else "zero",
    }  # fmt: skip
    assert error({}, {}, steps, options=options) <= TOLERANCE


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
def test_full_order_to_the_end(algorithm_type):
    for solver_order in (1, 2) if algorithm_type.startswith("sde") else (1, 2, 3):
        options = {
            "algorithm_type": algorithm_type, "solver_order": solver_order,
            "lower_order_final": False, "final_sigmas_type": "sigma_min",
        }  # fmt: skip
        assert error({}, {}, 18, options=options) <= TOLERANCE


@pytest.mark.parametrize("solver_order", [2, 3])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_every_spacing(spacing, solver_order):
    options = {"solver_order": solver_order}
    assert error({"sigma_spacing": spacing}, {f"use_{spacing}_sigmas": True}, options=options) <= TOLERANCE


@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_flows(solver_order):
    theirs = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    options = {"solver_order": solver_order}
    assert error({}, theirs, schedule=fastguide.FlowSchedule(shift=3.0), options=options) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 2, 6, 18, 19])
@pytest.mark.parametrize("solver_order", [2, 3])
def test_from_the_middle(solver_order, begin):
    assert error({}, {}, begin=begin, options={"solver_order": solver_order}) <= TOLERANCE


def test_the_noisiest_timesteps_are_left_out():
    assert error({"lambda_min_clipped": -2.0}, {"lambda_min_clipped": -2.0}) <= TOLERANCE
