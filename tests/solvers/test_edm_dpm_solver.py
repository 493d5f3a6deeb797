"""DPM-Solver++ in EDM's preconditioning, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error


@pytest.mark.parametrize("steps", [20, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_spacing", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("algorithm_type", "solver_order", "solver_type"),
    [
        ("dpmsolver++", 1, "midpoint"), ("dpmsolver++", 2, "midpoint"), ("dpmsolver++", 2, "heun"),
        ("dpmsolver++", 3, "midpoint"), ("sde-dpmsolver++", 1, "midpoint"), ("sde-dpmsolver++", 2, "midpoint"),
        ("sde-dpmsolver++", 2, "heun"),
    ],
)  # fmt: skip
def test_whole_loops_are_diffusers(algorithm_type, solver_order, solver_type, sigma_spacing, prediction_type, steps):
    options = {
        "solver_order": solver_order, "solver_type": solver_type, "algorithm_type": algorithm_type,
        "prediction_type": prediction_type,
    }  # fmt: skip
    table = fastguide.edm_dpm_solver(steps, sigma_spacing=sigma_spacing, **options)
    config = {**options, "sigma_schedule": sigma_spacing}
    unused = algorithm_type.startswith("sde")
    error = largest_error(
        table, "EDMDPMSolverMultistepScheduler", config, {"num_inference_steps": steps}, draws_at_the_end=unused
    )
    assert error <= TOLERANCE


def test_from_the_middle_and_to_the_smallest_sigma():
    for begin in (0, 6):
        table = fastguide.edm_dpm_solver(20, final_sigmas_type="sigma_min", solver_order=3, begin=begin)
        config = {"final_sigmas_type": "sigma_min", "solver_order": 3}
        name = "EDMDPMSolverMultistepScheduler"
        assert largest_error(table, name, config, {"num_inference_steps": 20}, begin=begin) <= TOLERANCE
