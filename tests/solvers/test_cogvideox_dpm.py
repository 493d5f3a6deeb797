"""CogVideoX's stochastic steps, against diffusers in float64."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.diffusers_in_float64 import SHAPE, TOLERANCE, diffusers, in_float64, model, relative

SCHEDULE = fastguide.NoiseSchedule.scaled_linear().shift_snr(3.0).rescale_zero_terminal_snr()


@pytest.mark.parametrize("begin", [0, 5])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_whole_loops_are_diffusers(prediction_type, begin):
    """diffusers draws twice from the second call on, and drops the first; its caller keeps the x_0 of the last call."""
    table = fastguide.cogvideox_dpm(SCHEDULE, 20, prediction_type=prediction_type, begin=begin)
    generator = torch.Generator().manual_seed(7)
    theirs = ours = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    history = fastguide.History(table, ours)
    with in_float64(diffusers.CogVideoXDPMScheduler):
        scheduler = diffusers.CogVideoXDPMScheduler(
            prediction_type=prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=True
        )
        scheduler.set_timesteps(20)
        old, back = None, None
        assert scheduler.timesteps[begin:].tolist() == list(table.host_timesteps)
        for call, t in enumerate(scheduler.timesteps[begin:]):
            drawn = torch.Generator()
            drawn.set_state(generator.get_state())
            theirs, old = scheduler.step(model(theirs, t, 1.0), old, t, back, theirs, generator=generator)
            draws = 2 if 0 < call < len(table) - 1 else 1
            noise = [torch.randn(SHAPE, dtype=torch.float64, generator=drawn) for _ in range(draws)][-1]
            assert torch.equal(drawn.get_state(), generator.get_state())
            original = torch.empty_like(ours)
            ours = fastguide.guided_step(
                table, call, ours, model(ours, t, 1.0), noise=noise, original=original, history=history
            )
            assert max(relative(ours, theirs), relative(original, old)) <= TOLERANCE
            back = t


def test_epsilon_says_nothing_without_signal():
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of x_0 at timestep 999"):
        fastguide.cogvideox_dpm(SCHEDULE, 20, prediction_type="epsilon")
