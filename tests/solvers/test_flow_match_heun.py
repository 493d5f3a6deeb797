"""Heun's method along a flow, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

NAME = "FlowMatchHeunDiscreteScheduler"
STEPS = {"num_inference_steps": 10}
CHURNS = {
    "no churn": {},
    "churn": {"s_churn": 2.0, "s_noise": 1.003},
    "churn in a window": {"s_churn": 4.0, "s_tmin": 0.3, "s_tmax": 0.9},
}


@pytest.mark.parametrize("begin", [0, 1, 6])
@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_whole_loops_are_diffusers(shift, churn, begin):
    """diffusers draws in the second call too, and does not use it."""
    options = CHURNS[churn]
    table = fastguide.flow_match_heun(fastguide.FlowSchedule(shift=shift), 10, **options, begin=begin)
    drawn = [call + 1 for call, adds in enumerate(table.adds_noise) if adds and call < len(table) - 1]
    error = largest_error(table, NAME, {"shift": shift}, STEPS, begin=2 * begin, step=options, unused_draws=drawn)
    assert error <= TOLERANCE
    assert (table.steps, len(table)) == (10 - begin, 19 - 2 * begin)
