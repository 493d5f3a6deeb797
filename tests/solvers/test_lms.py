"""The linear multistep method, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.solvers.test_two_calls import SCHEDULE, STEPS, TABLES, options_of
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_whole_loops_are_diffusers(prediction_type, order, name):
    options, config = options_of(name)
    table = fastguide.lms(SCHEDULE, 12, prediction_type=prediction_type, order=order, **options)
    config |= {"prediction_type": prediction_type}
    assert largest_error(table, "LMSDiscreteScheduler", config, STEPS, step={"order": order}) <= TOLERANCE
    assert table.history_slots == order - 1
