"""UniPC, against diffusers in float64."""

from __future__ import annotations

import itertools

import numpy
import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "final_sigmas_type": "zero"}
NAME = "UniPCMultistepScheduler"
SMALLEST = {"final_sigmas_type": "sigma_min"}


def error(ours, theirs, steps=20, *, schedule=SCHEDULE, options=None, begin=0):
    options = options or {}
    table = fastguide.unipc(schedule, steps, **options, **ours, begin=begin)
    config = {**BETAS, **options, **theirs}
    return largest_error(table, NAME, config, {"num_inference_steps": steps}, begin=begin)


@pytest.mark.parametrize("steps", [20, 6])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("solver_order", "solver_type", "predict_x0"), itertools.product([1, 2, 3], ["bh1", "bh2"], [False, True])
)
def test_whole_loops_are_diffusers(solver_order, solver_type, predict_x0, prediction_type, steps):
    options = {
        "solver_order": solver_order, "solver_type": solver_type, "predict_x0": predict_x0,
        "prediction_type": prediction_type, **({} if predict_x0 and solver_type == "bh2" else SMALLEST),
    }  # fmt: skip
    assert error({}, {}, steps, options=options) <= TOLERANCE


TABLES = {
    "leading": ({}, {}, {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": ({}, {}, {"timestep_spacing": "trailing"}),
    "sigma min": ({}, {}, SMALLEST),
    "karras": ({"sigma_spacing": "karras"}, {"use_karras_sigmas": True}, {}),
    "karras to sigma min": ({"sigma_spacing": "karras"}, {"use_karras_sigmas": True}, SMALLEST),
    "exponential": ({"sigma_spacing": "exponential"}, {"use_exponential_sigmas": True}, {}),
    "beta": ({"sigma_spacing": "beta"}, {"use_beta_sigmas": True}, {}),
    "full order at the end": ({}, {}, {"lower_order_final": False, **SMALLEST}),
    "some not corrected": ({"disable_corrector": (0, 7)}, {"disable_corrector": [0, 7]}, {}),
}


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("name", TABLES)
def test_every_spacing_and_end(name, solver_order):
    ours, theirs, options = TABLES[name]
    assert error(ours, theirs, options={**options, "solver_order": solver_order}) <= TOLERANCE


@pytest.mark.parametrize("steps", [50, 8])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_flows(shift, solver_order, steps):
    """With a shift of 5, Wan's."""
    theirs = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    schedule = fastguide.FlowSchedule(shift=shift)
    assert error({}, theirs, steps, schedule=schedule, options={"solver_order": solver_order}) <= TOLERANCE


def test_given_sigmas_of_a_flow_and_a_terminal_shift():
    schedule = fastguide.FlowSchedule(use_dynamic_shifting=True, shift_terminal=0.1)
    sigmas = [1.0, 0.8, 0.5, 0.25]
    table = fastguide.unipc(schedule, sigmas=sigmas, mu=1.15)
    config = {
        "use_flow_sigmas": True, "use_dynamic_shifting": True, "shift_terminal": 0.1, "final_sigmas_type": "zero",
        "prediction_type": "flow_prediction",
    }  # fmt: skip
    assert largest_error(table, NAME, config, {"sigmas": numpy.array(sigmas), "mu": 1.15}) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 7, 18, 19])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_from_the_middle(solver_order, begin):
    for disabled in ((), (3, 9)):
        theirs = {"disable_corrector": list(disabled)}
        options = {"solver_order": solver_order}
        assert error({"disable_corrector": disabled}, theirs, begin=begin, options=options) <= TOLERANCE


def test_a_schedule_without_signal_at_its_end():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    assert error({}, {"rescale_betas_zero_snr": True}, schedule=schedule, options=options) <= TOLERANCE
