"""Multistep DPM-Solver, against diffusers in float64, and its orders."""

from __future__ import annotations

import itertools

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAME = "DPMSolverMultistepScheduler"


def error(ours, theirs, steps=20, *, schedule=SCHEDULE, options=None, begin=0):
    """Run both; ``options``: of both, by the same names."""
    options = options or {}
    table = fastguide.dpm_solver(schedule, steps, **options, **ours, begin=begin)
    unused = options.get("algorithm_type", "").startswith("sde") and not table.adds_noise[-1]
    config = {**BETAS, **options, **theirs}
    return largest_error(table, NAME, config, {"num_inference_steps": steps}, begin=begin, draws_at_the_end=unused)


TYPES = [
    (algorithm_type, solver_order, solver_type)
    for algorithm_type, solver_order, solver_type in itertools.product(
        ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"], [1, 2, 3], ["midpoint", "heun"]
    )
    if not (algorithm_type == "sde-dpmsolver" and solver_order == 3)
    and not (solver_order != 2 and solver_type == "heun")
]


@pytest.mark.parametrize("steps", [20, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("algorithm_type", "solver_order", "solver_type"), TYPES)
def test_whole_loops_are_diffusers(algorithm_type, solver_order, solver_type, prediction_type, steps):
    options = {
        "algorithm_type": algorithm_type, "solver_order": solver_order, "solver_type": solver_type,
        "prediction_type": prediction_type,
        "final_sigmas_type": "zero" if algorithm_type.endswith("++") else "sigma_min",
    }  # fmt: skip
    assert error({}, {}, steps, options=options) <= TOLERANCE


TABLES = {
    "leading": ({}, {}, {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": ({}, {}, {"timestep_spacing": "trailing"}),
    "sigma min": ({}, {}, {"final_sigmas_type": "sigma_min"}),
    "karras": ({"sigma_spacing": "karras"}, {"use_karras_sigmas": True}, {}),
    "karras to sigma min": (
        {"sigma_spacing": "karras"}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"},
    ),
    "exponential": ({"sigma_spacing": "exponential"}, {"use_exponential_sigmas": True}, {}),
    "beta": ({"sigma_spacing": "beta"}, {"use_beta_sigmas": True}, {}),
    "euler at the end": ({}, {}, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    "full order at the end": ({}, {}, {"lower_order_final": False}),
    "without the noisiest": ({}, {}, {"lambda_min_clipped": -2.0}),
}  # fmt: skip


@pytest.mark.parametrize("steps", [20, 8])
@pytest.mark.parametrize("solver_order", [2, 3])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("name", TABLES)
def test_every_spacing_and_end(name, algorithm_type, solver_order, steps):
    ours, theirs, options = TABLES[name]
    options = {**options, "algorithm_type": algorithm_type, "solver_order": solver_order}
    assert error(ours, theirs, steps, options=options) <= TOLERANCE


@pytest.mark.parametrize("steps", [20, 8])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
def test_flows(algorithm_type, solver_order, steps):
    options = {"algorithm_type": algorithm_type, "solver_order": solver_order}
    theirs = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    assert error({}, theirs, steps, schedule=fastguide.FlowSchedule(shift=3.0), options=options) <= TOLERANCE


def test_a_flow_with_dynamic_shifting():
    table = fastguide.dpm_solver(fastguide.FlowSchedule(use_dynamic_shifting=True), 20, mu=1.15)
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    assert largest_error(table, NAME, config, {"num_inference_steps": 20, "mu": 1.15}) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 7, 18, 19])
@pytest.mark.parametrize("solver_order", [2, 3])
def test_from_the_middle(solver_order, begin):
    for spacing in (None, "karras"):
        theirs = {"use_karras_sigmas": spacing is not None}
        options = {"solver_order": solver_order}
        assert error({"sigma_spacing": spacing}, theirs, begin=begin, options=options) <= TOLERANCE


def test_given_timesteps():
    table = fastguide.dpm_solver(SCHEDULE, timesteps=[999, 850, 600, 300, 80])
    assert largest_error(table, NAME, BETAS, {"timesteps": [999, 850, 600, 300, 80]}) <= TOLERANCE


def test_a_schedule_without_signal_at_its_end():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    assert error({}, {"rescale_betas_zero_snr": True}, schedule=schedule, options=options) <= TOLERANCE
