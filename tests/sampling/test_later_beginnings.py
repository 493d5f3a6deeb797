"""Loops that begin later, or beside a known image, with tables whose calls go on from earlier ones."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, NoiseSchedule, Sampler, StepTable, guided_step
from fastguide.schedules import Levels

SCHEDULE = NoiseSchedule.scaled_linear()
IMAGE, HALF = torch.ones(1, 4), torch.full((1, 4), 0.5)
GOES_BACK = [fastguide.heun, fastguide.dpm2, fastguide.unipc, fastguide.sa_solver, fastguide.pndm]


def model(x, t, y=None):
    return 0.1 * x


@pytest.mark.parametrize("solver", GOES_BACK, ids=lambda solver: solver.__name__)
def test_masks_that_blend_are_refused_where_a_step_goes_back(solver):
    sampler = Sampler(model, solver(SCHEDULE, 4))
    with pytest.raises(ValueError, match=f"mask: expected 0 and 1 alone with {solver.__name__}"):
        sampler(torch.randn(1, 4), image=IMAGE, mask=HALF)
    painted = sampler(torch.randn(1, 4), image=IMAGE, mask=torch.tensor([[True, False, True, False]]))
    assert torch.equal(painted[:, 1::2], IMAGE[:, 1::2])


@pytest.mark.parametrize("solver", [fastguide.dpm_solver, fastguide.deis, fastguide.lms, fastguide.ddim])
def test_masks_that_blend_where_no_step_goes_back(solver):
    Sampler(model, solver(SCHEDULE, 4))(torch.randn(1, 4), image=IMAGE, mask=HALF)


def test_a_table_without_the_level_of_a_known_part():
    one = torch.ones(2, dtype=torch.float64)
    levels = Levels(one / 2, one / 2)
    table = StepTable.from_columns(torch.tensor([1, 0]), {"out_sample": one}, levels=levels)
    with pytest.raises(ValueError, match="mask: expected a table whose columns known_sample and known_noise"):
        Sampler(model, table)(torch.randn(1, 4), image=IMAGE, mask=torch.ones(1, 4))


def test_scales_of_each_call_of_a_solver_whose_first_step_is_longer(generator):
    """The calls of pndm from step 2 on are not the last ones of all."""
    cond = {"cond": torch.ones(1), "uncond": torch.zeros(1)}
    x_T = torch.randn(1, 4, generator=generator)
    table = fastguide.pndm(SCHEDULE, 4)
    sampler = Sampler(model, table, ClassifierFree.per_step([1.0, 2.0, 3.0, 4.0, 5.0]))
    sampler(x_T, **cond)
    sampler(x_T, **cond, image=IMAGE, strength=1.0)
    with pytest.raises(ValueError, match="guidance: expected scales that are the same at all steps, as pndm"):
        sampler(x_T, **cond, image=IMAGE, strength=0.5)


def test_a_gradient_that_moves_the_mean_only_of_earlier_steps(generator):
    """The last steps of SA-Solver are without noise, and so without a variance: a gradient changes nothing there."""
    table = fastguide.sa_solver(SCHEDULE, 10, tau_func=lambda timestep: float(timestep > 500))
    image, x_T = torch.randn(2, 1, 4, generator=generator)
    seeds = {"seeds": [3], "image": image, "strength": 0.4}
    guidance = Classifier(lambda x, t: x[:, :2], 5.0, form="mean")
    guided = Sampler(model, table, guidance)(x_T, labels=torch.zeros(1, dtype=torch.int64), **seeds)
    assert torch.equal(guided, Sampler(model, table)(x_T, **seeds))


@pytest.mark.parametrize(
    ("table", "calls", "message"),
    [
        (fastguide.dpm_solver(SCHEDULE, 10), slice(4, None), "expected a table that its solver makes with begin=4"),
        (fastguide.dpm_solver(SCHEDULE, 10, begin=3), slice(4, None), "makes with begin=7"),
        (fastguide.dpm_solver(SCHEDULE, 10)[:8], slice(2, None), "makes with begin=2"),
        (fastguide.heun(SCHEDULE, 10), slice(4, None), "makes with begin=2"),
        (fastguide.heun(SCHEDULE, 10), slice(5, None), "expected the begin= of a step, such as 2, as call 5 is in the"),
    ],
)
def test_slices_say_how_to_begin_later(table, calls, message):
    with pytest.raises(ValueError, match=message):
        table[calls]


def test_a_table_cut_short_begins_later_only_by_its_solver():
    table = fastguide.dpm_solver(SCHEDULE, 10, begin=3)[:5]
    with pytest.raises(ValueError, match="one that the solver makes with begin=5"):
        Sampler(model, table)(torch.randn(1, 4), image=IMAGE, strength=0.6)


def test_entries_that_no_call_has_written_are_zero():
    table = fastguide.dpm_solver(SCHEDULE, 4)
    x = torch.ones(1, 4)
    history = fastguide.History(table, x)
    skipped = guided_step(table, torch.tensor(2), x, x, history=history)
    columns = {name: values[2].item() for name, values in table.coefficients().items()}
    x_0 = columns["x0_scale"] * (columns["x0_sample"] + columns["x0_pred"])
    assert skipped[0, 0].item() == pytest.approx(columns["out_x0"] * x_0 + columns["out_sample"], rel=1e-5)
