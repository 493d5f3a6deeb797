"""DEIS, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAME = "DEISMultistepScheduler"


def error(ours, theirs, steps=20, *, schedule=SCHEDULE, options=None, begin=0):
    options = options or {}
    table = fastguide.deis(schedule, steps, **options, **ours, begin=begin)
    return largest_error(table, NAME, {**BETAS, **options, **theirs}, {"num_inference_steps": steps}, begin=begin)


@pytest.mark.parametrize("steps", [20, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_whole_loops_are_diffusers(solver_order, prediction_type, steps):
    assert error({}, {}, steps, options={"solver_order": solver_order, "prediction_type": prediction_type}) <= TOLERANCE


@pytest.mark.parametrize("solver_order", [2, 3])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_every_spacing(spacing, solver_order):
    options = {"solver_order": solver_order}
    assert error({"sigma_spacing": spacing}, {f"use_{spacing}_sigmas": True}, options=options) <= TOLERANCE


@pytest.mark.parametrize("steps", [20, 8])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_flows(solver_order, steps):
    theirs = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    schedule = fastguide.FlowSchedule(shift=3.0)
    assert error({}, theirs, steps, schedule=schedule, options={"solver_order": solver_order}) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 7, 19])
def test_from_the_middle(begin):
    assert error({}, {}, begin=begin, options={"solver_order": 3}) <= TOLERANCE
