"""The tables that ``step_table`` returns: their loops end where diffusers' own do."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.counted_loops import model
from tests.support.scheduler_pair import COUNTED, SHAPE, diffusers, fused, randn, steps_of

STEPS = 7
CONFIGS = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "HeliosScheduler": {"stages": 1},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False, "variance_type": "fixed_small"},
}
OF_PATHS = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
"""Whose noise is of one path."""
TABLES = [*CONFIGS, *(name for name in COUNTED if name not in (*CONFIGS, *OF_PATHS, "SCMScheduler"))]


@pytest.mark.parametrize("name", TABLES)
def test_a_loop_by_the_table_is_diffusers(name):
    """The deterministic part of it: noise is drawn by the same generator, in the same order, where there is any."""
    theirs = getattr(diffusers, name)(**CONFIGS.get(name, {}))
    table = fused.step_table(theirs, STEPS)
    theirs.set_timesteps(STEPS)
    first = randn(*SHAPE) * table.init_noise_sigma
    expected = got = first
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    options = {"generator": generators[0]} if "generator" in theirs.step.__code__.co_varnames else {}
    for t in steps_of(theirs):
        given = theirs.scale_model_input(expected, t) if hasattr(theirs, "scale_model_input") else expected
        expected = theirs.step(model(given, t, 0.5), t, expected, return_dict=False, **options)[0]
    history = fastguide.History(table, got) if table.history_slots else None
    for call, t in enumerate(table.timesteps):
        output = model(table.in_scales[call] * got, t, 0.5)
        if name == "SASolverScheduler" and not table.adds_noise[call]:  # diffusers draws there as well
            torch.randn(SHAPE, generator=generators[1])
        got = fastguide.guided_step(table, call, got, output, generator=generators[1], history=history)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", OF_PATHS)
def test_noise_of_a_path_is_no_table(name):
    with pytest.raises(ValueError, match="got one with noise of one path of Brownian motion"):
        fused.step_table(getattr(diffusers, name)(), STEPS)


def test_wuerstchen_has_any_number_of_steps():
    """Its timesteps are real numbers, of which there is no largest count."""
    assert len(fused.step_table(diffusers.DDPMWuerstchenScheduler(), 5)) == 5
    with pytest.raises(ValueError, match=r"num_inference_steps: expected 1 to inf, got 0"):
        fused.step_table(diffusers.DDPMWuerstchenScheduler(), 0)


def test_a_scheduler_without_a_loop_of_its_own_is_refused():
    with pytest.raises(TypeError, match="expected one whose loop is a table of steps, got DDIMInverseScheduler"):
        fused.step_table(diffusers.DDIMInverseScheduler(), 5)
