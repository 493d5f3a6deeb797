"""The pseudo linear multistep method, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}


@pytest.mark.parametrize("steps", [20, 4, 3, 2, 1])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_whole_loops_are_diffusers(prediction_type, set_alpha_to_one, steps):
    options = {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one, "steps_offset": 1}
    table = fastguide.pndm(SCHEDULE, steps, **options)
    error = largest_error(table, "PNDMScheduler", {**BETAS, **options}, {"num_inference_steps": steps})
    assert error <= TOLERANCE
    assert table.steps == steps


def test_a_later_beginning_makes_two_calls_there():
    table = fastguide.pndm(SCHEDULE, 10, begin=4)
    assert table.host_timesteps == (500, 400, 400, 300, 200, 100, 0)
    alone = fastguide.pndm(SCHEDULE, timesteps=[500, 400, 300, 200, 100, 0])
    assert table.rows.equal(alone.rows)
