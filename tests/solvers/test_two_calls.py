"""Heun's method and DPM2, whose steps make two model calls, against diffusers in float64."""

from __future__ import annotations

import pytest

import fastguide
from tests.support.diffusers_in_float64 import TOLERANCE, largest_error

SCHEDULE = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = {"num_inference_steps": 12}
TABLES = {
    "linspace": ({}, {}),
    "leading": ({}, {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": ({}, {"timestep_spacing": "trailing"}),
    "karras": ({"sigma_spacing": "karras"}, {"use_karras_sigmas": True}),
    "exponential": ({"sigma_spacing": "exponential"}, {"use_exponential_sigmas": True}),
    "beta": ({"sigma_spacing": "beta"}, {"use_beta_sigmas": True}),
}


def options_of(name):
    ours, config = TABLES[name]
    same = {key: value for key, value in config.items() if not key.startswith("use_")}
    return ours | same, {**BETAS, **config}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_heun_s_loops_are_diffusers(prediction_type, clip, name):
    options, config = options_of(name)
    table = fastguide.heun(SCHEDULE, 12, prediction_type=prediction_type, clip_sample_range=clip, **options)
    config |= {"prediction_type": prediction_type, "clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    assert largest_error(table, "HeunDiscreteScheduler", config, STEPS) <= TOLERANCE


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("ancestral", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpm2_s_loops_are_diffusers(prediction_type, ancestral, name):
    options, config = options_of(name)
    table = fastguide.dpm2(SCHEDULE, 12, prediction_type=prediction_type, ancestral=ancestral, **options)
    config |= {"prediction_type": prediction_type}
    scheduler = "KDPM2AncestralDiscreteScheduler" if ancestral else "KDPM2DiscreteScheduler"
    assert largest_error(table, scheduler, config, STEPS) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 4, 11])
def test_from_the_middle(begin):
    for solver, name in ((fastguide.heun, "HeunDiscrete"), (fastguide.dpm2, "KDPM2Discrete")):
        table = solver(SCHEDULE, 12, begin=begin)
        assert largest_error(table, f"{name}Scheduler", BETAS, STEPS, begin=2 * begin) <= TOLERANCE
        assert (table.steps, len(table)) == (12 - begin, 23 - 2 * begin)
