"""The step table beyond DDPM and DDIM: real timesteps, scaled inputs, steps of several model calls, levels."""

from __future__ import annotations

import pytest
import torch

from fastguide import Cursor, StepTable, ddim, guided_step
from fastguide.schedules import Levels
from tests.support.cases import SCHEDULE


def flow_table(**options):
    """Two Heun-like steps of flow matching in three calls, at real timesteps."""
    sigma = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    columns = {"out_sample": torch.ones_like(sigma), "out_pred": torch.tensor([-0.5, -0.25, -0.25]).double()}
    columns["in_scale"] = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    options = {"levels": Levels(1 - sigma, sigma), "first_in_scale": 0.125, **options}
    return StepTable.from_columns(1000 * sigma, columns, completes_step=[False, True, True], name="flow", **options)


def test_calls_and_steps_are_counted_apart():
    table = flow_table()
    assert (len(table), table.steps) == (3, 2)
    assert repr(table) == "StepTable(flow, 2 steps in 3 calls, timesteps 1000.0 .. 250.0, device=cpu)"
    assert (len(table[1:]), table[1:].steps) == (2, 2)
    assert ddim(SCHEDULE, 5).steps == 5
    with pytest.raises(ValueError, match="completes_step: expected 3, one a call, got 1"):
        StepTable.from_columns(torch.arange(3), {}, completes_step=[True])


def test_a_slice_begins_with_the_scale_of_the_row_before_it():
    table = flow_table()
    assert table.in_scales[:3] == (0.125, 0.5, 0.25)
    assert [table[k:].first_in_scale for k in range(3)] == [0.125, 0.5, 0.25]
    assert table[1:][1:].first_in_scale == 0.25
    assert table.scales_inputs
    assert not ddim(SCHEDULE, 5).scales_inputs


def test_noise_alone_has_a_standard_deviation_where_the_table_begins():
    table = flow_table(init_noise_sigma=14.6)
    assert [table[k:].init_noise_sigma for k in range(3)] == [14.6, 1.0, 1.0]
    assert table[:2].to("meta").init_noise_sigma == 14.6
    assert ddim(SCHEDULE, 5).init_noise_sigma == 1.0
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="init_noise_sigma: expected a positive number"):
            flow_table(init_noise_sigma=value)


def test_levels_are_sliced_and_moved_with_the_rows():
    table = flow_table()[1:].to("meta")
    assert table.levels.alpha.tolist() == [0.5, 0.75]
    assert table.levels.sigma.tolist() == [0.5, 0.25]
    assert table.host_timesteps == (500.0, 250.0)
    assert table.timesteps.dtype == torch.float64


@pytest.mark.parametrize("timesteps", [None, 4])
def test_real_timesteps_reach_the_model(timesteps, backend):
    table, x = flow_table(), torch.ones(2, 3)
    cursor = Cursor(timesteps=timesteps, timestep_dtype=torch.float32).start(table)
    seen = [cursor.timestep.unique().tolist()]
    for _ in range(2):
        guided_step(table, cursor, x, torch.zeros_like(x), out=x, backend=backend)
        seen.append(cursor.timestep.unique().tolist())
    assert seen == [[1000.0], [500.0], [250.0]]


def test_whole_timesteps_are_refused_for_a_table_of_real_ones():
    with pytest.raises(ValueError, match=r"timestep_dtype: expected torch\.float32 for a table of real timesteps"):
        Cursor().start(flow_table())
    with pytest.raises(
        ValueError, match=r"timestep: expected a whole number for a Cursor of int64 timesteps, got 0\.5"
    ):
        Cursor(2).place(0, 0, 3, 0.5)
    x, whole = torch.ones(2, 3), Cursor(2).start(ddim(SCHEDULE, 3))
    with pytest.raises(ValueError, match=r"index: expected a Cursor with timestep_dtype=torch\.float32"):
        guided_step(flow_table(), whole, x, x.clone(), out=x)


@pytest.mark.parametrize(
    ("columns", "levels", "message"),
    [
        (
            {"out_x0": torch.ones(2)},
            None,
            "columns: expected a tensor of shape \\(3,\\) in 'out_x0', got shape \\(2,\\)",
        ),
        (
            {"out_x0": torch.tensor(1.0)},
            None,
            "columns: expected a tensor of shape \\(3,\\) in 'out_x0', got shape \\(\\)",
        ),
        ({"out_x0": [1.0, 1.0, 1.0]}, None, "columns: expected a tensor of shape \\(3,\\) in 'out_x0', got list"),
        ({}, Levels(torch.ones(2), torch.ones(3)), "levels: expected two of shape \\(3,\\), one a call, got"),
    ],
)
def test_columns_and_levels_have_one_value_a_call(columns, levels, message):
    with pytest.raises(ValueError, match=message):
        StepTable.from_columns(torch.tensor([2, 1, 0]), columns, levels=levels)
