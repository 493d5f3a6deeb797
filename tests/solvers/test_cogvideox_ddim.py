"""CogVideoX's DDIM, against diffusers in float64."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import NoiseSchedule
from tests.support.diffusers_in_float64 import TOLERANCE, diffusers, in_float64, largest_error

NAME = "CogVideoXDDIMScheduler"
STEPS = {"num_inference_steps": 20}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_whole_loops_are_diffusers(prediction_type, timestep_spacing, set_alpha_to_one):
    options = {
        "prediction_type": prediction_type, "timestep_spacing": timestep_spacing, "set_alpha_to_one": set_alpha_to_one,
    }  # fmt: skip
    table = fastguide.cogvideox_ddim(NoiseSchedule.scaled_linear().shift_snr(3.0), 20, **options)
    assert largest_error(table, NAME, options, STEPS) <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_without_signal_at_the_end(scale):
    schedule = NoiseSchedule.scaled_linear().shift_snr(scale).rescale_zero_terminal_snr()
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    config |= {"rescale_betas_zero_snr": True, "snr_shift_scale": scale}
    assert largest_error(fastguide.cogvideox_ddim(schedule, 20), NAME, config, STEPS) <= TOLERANCE
    with in_float64(diffusers.CogVideoXDDIMScheduler):
        theirs = diffusers.CogVideoXDDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod, theirs, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of x_0 at timestep 999"):
        fastguide.cogvideox_ddim(schedule, 20, prediction_type="epsilon")


def test_it_is_ddim_of_its_own_name():
    schedule = NoiseSchedule.scaled_linear()
    assert repr(fastguide.cogvideox_ddim(schedule, 4)).startswith("StepTable(cogvideox_ddim, 4 steps")
    with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule, got FlowSchedule"):
        fastguide.cogvideox_ddim(fastguide.FlowSchedule(), 4)
