"""CFG++ as one scale a step: against its own update, over schedules, prediction types and solvers."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import ClassifierFree, FlowSchedule, NoiseSchedule, guided_step
from fastguide.schedules.predictions import epsilon_from, original_from

SCHEDULE = NoiseSchedule.scaled_linear()
TABLES = {
    "ddim": (fastguide.ddim(SCHEDULE, 20), "epsilon"),
    "ddim of v": (fastguide.ddim(SCHEDULE, 20, prediction_type="v_prediction"), "v_prediction"),
    "ddim of x_0": (fastguide.ddim(SCHEDULE, 20, prediction_type="sample"), "sample"),
    "euler": (fastguide.euler(SCHEDULE, 20), "epsilon"),
    "flow": (fastguide.flow_match_euler(FlowSchedule(), 20), "flow_prediction"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_step_is_cfg_plus_plus(name):
    table, kind = TABLES[name]
    generator = torch.Generator().manual_seed(1)
    x, u, c = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    guidance = ClassifierFree.plus_plus(table, 0.6)
    for index in range(len(table) - 1):
        level, after = (table.levels.at(slice(k, k + 1)) for k in (index, index + 1))
        x_0, noise = original_from(kind, level), epsilon_from(kind, level)
        m = u + 0.6 * (c - u)
        guided = x_0.scale * (x_0.sample * x + x_0.pred * m)
        expected = after.alpha * guided + after.sigma * noise.scale * (noise.sample * x + noise.pred * u)
        got = guided_step(table, index, x, [u, c], guidance)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_last_step_is_x_0_and_others_guide_more():
    scales = ClassifierFree.plus_plus(TABLES["ddim"][0], 0.6).weights(torch.device("cpu"), torch.float64)[:, 0, 1]
    assert bool((scales[:-1] > 0.6).all())
    assert abs(scales[-1] - 0.6) < 1e-12


def test_with_noise_the_mean_is_cfg_plus_plus():
    table = fastguide.ddim(SCHEDULE, 20, eta=0.5)
    generator = torch.Generator().manual_seed(2)
    x, u, c, z = torch.randn(4, 2, 5, generator=generator, dtype=torch.float64)
    guidance, index = ClassifierFree.plus_plus(table, 0.6), 7
    level, after = (table.levels.at(slice(k, k + 1)) for k in (index, index + 1))
    deviation = table.coefficients()["out_noise"][index]
    guided = (x - level.sigma * (u + 0.6 * (c - u))) / level.alpha
    expected = after.alpha * guided + (after.sigma**2 - deviation**2).sqrt() * u + deviation * z
    torch.testing.assert_close(guided_step(table, index, x, [u, c], guidance, noise=z), expected, rtol=1e-9, atol=1e-9)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected one that does not clip"):
        ClassifierFree.plus_plus(fastguide.ddim(SCHEDULE, 20, clip_sample_range=1.0), 0.6)
    with pytest.raises(ValueError, match="expected one of a first-order solver"):
        ClassifierFree.plus_plus(fastguide.dpm_solver(SCHEDULE, 20), 0.6)
    with pytest.raises(TypeError, match="expected a number for CFG"):
        ClassifierFree.plus_plus(TABLES["ddim"][0], [0.5, 0.6])
    columns = {"x0_pred": torch.ones(2, dtype=torch.float64)}
    unknown = fastguide.StepTable.from_columns(torch.tensor([1, 0]), columns, name="of mine")
    with pytest.raises(ValueError, match="expected one that knows the levels of its calls, got of mine"):
        ClassifierFree.plus_plus(unknown, 0.6)
