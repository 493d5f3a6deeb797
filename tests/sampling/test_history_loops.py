"""Loops whose calls leave something for later ones: the sampler and captured graphs give what single steps give."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import fastguide
from fastguide import ClassifierFree, History, Sampler, StepTable, guided_step
from fastguide.schedules import Levels
from tests.support.loop_cases import COND, FREE, SCHEDULE, UNCOND, Model, x_T
from tests.support.recorded_graph import recorded  # noqa: F401

STEPS = 5


def adams_bashforth(steps=STEPS, order=3):
    """The explicit Adams methods of up to three calls for dx/dt = m, from t = 1 to 0; Hairer et al. 1993, III.1."""
    weights = [(1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12)]
    columns = {name: torch.zeros(steps, dtype=torch.float64) for name in ("out_hist_0", "out_hist_1", "hist_slot")}
    columns |= {
        name: torch.ones(steps, dtype=torch.float64) for name in ("x0_scale", "x0_pred", "out_sample", "hist_x0")
    }
    columns["out_x0"] = torch.zeros(steps, dtype=torch.float64)
    ring = max(order - 1, 1)
    for call in range(steps):
        chosen = weights[min(call, order - 1)]
        columns["out_x0"][call] = -chosen[0] / steps
        columns["hist_slot"][call] = call % ring
        for back, weight in enumerate(chosen[1:], 1):
            columns[f"out_hist_{(call - back) % ring}"][call] = -weight / steps
    levels = Levels.flow_matching(torch.linspace(1, 1 / steps, steps, dtype=torch.float64))
    return StepTable.from_columns(torch.arange(steps - 1, -1, -1), columns, levels=levels, name="adams_bashforth")


@torch.no_grad()
def by_steps(table, x, model=None):
    """The loop by ``guided_step``, one call after the other."""
    model, history = model or Model(), History(table, x)
    for call, timestep in enumerate(table.host_timesteps):
        told = torch.full((2 * len(x),), int(timestep))
        predictions = model(torch.cat([x, x]), told, torch.cat([UNCOND[: len(x)], COND[: len(x)]]))
        x = guided_step(table, call, x, predictions, ClassifierFree(2.0), history=history)
    return x


@pytest.mark.parametrize("order", [2, 3])
def test_the_sampler_makes_the_history(order):
    table = adams_bashforth(order=order)
    sampler, x = Sampler(Model(), table, ClassifierFree(2.0)), x_T()
    assert table.history_slots == order - 1
    for _ in range(2):  # the second run begins with the entries of the first
        assert torch.equal(sampler(x, **FREE), by_steps(table, x))


def test_compiled_steps_with_a_history_are_the_steps():
    table, x = adams_bashforth(3), torch.randn(2, 8)

    def step(history, index, x):
        return guided_step(table, index, x, x * 0.5, history=history)

    compiled, ours, theirs = torch.compile(step, fullgraph=True), History(table, x), History(table, x)
    given = expected = x
    for index in range(3):
        given, expected = compiled(ours, index, given), step(theirs, index, expected)
        assert torch.equal(given, expected), index
    with pytest.raises(ValueError, match="index: expected 3, the call after the last one"):
        step(ours, 1, x)


def test_replays_with_a_history_are_right_for_other_tables(recorded):  # noqa: F811
    sampler = Sampler(Model(), adams_bashforth(), ClassifierFree(2.0))
    for steps in (5, 7, 5):
        table = adams_bashforth(steps)
        sampler.table = table
        assert torch.equal(sampler(x_T(), **FREE), by_steps(table, x_T()))
    assert recorded.captured == 1


def test_image_to_image_needs_to_know_how_a_table_begins_later():
    sampler = Sampler(Model(), adams_bashforth(), ClassifierFree(2.0))
    message = "table: expected a whole one of its solver's, as adams_bashforth goes on from earlier calls.* begin=3"
    with pytest.raises(ValueError, match=message):
        sampler(x_T(), image=x_T(), strength=0.4, **FREE)


@pytest.mark.parametrize(("order", "fitted"), [(1, 1), (2, 2), (3, 2)])
def test_the_order_of_convergence_is_the_method_s(order, fitted):
    """dx/dt = x from 1 to 0 in float64: exp(-1); the slope over doubled numbers of steps.

    The first call is Euler's method, whose one error is of the second order: the third order does not show.
    """
    found = []
    for steps in (40, 80, 160):
        table, x = adams_bashforth(steps, order), torch.ones(1, 1, dtype=torch.float64)
        history = History(table, x)
        for call in range(steps):
            x = guided_step(table, call, x, x.clone(), history=history if table.history_slots else None)
        found.append(abs(float(x) - torch.e**-1))
    slopes = [torch.log2(torch.tensor(a / b)).item() for a, b in pairwise(found)]
    assert all(abs(slope - fitted) < 0.2 for slope in slopes), slopes


def test_a_callback_s_edit_is_what_the_next_call_goes_on_from():
    """UniPC's corrector goes back to the sample; diffusers' would drop the edit."""
    table, x = fastguide.unipc(SCHEDULE, 6), x_T()

    def edit(call, timestep, sample):
        if call == 2:
            sample.mul_(0.5)

    got = Sampler(Model(), table, ClassifierFree(2.0))(x, callback=edit, **FREE)
    history, expected, model = History(table, x), x, Model()
    for call, timestep in enumerate(table.host_timesteps):
        told = torch.full((2 * len(x),), int(timestep))
        with torch.no_grad():
            predictions = model(torch.cat([expected, expected]), told, torch.cat([UNCOND, COND]))
        expected = guided_step(table, call, expected, predictions, ClassifierFree(2.0), history=history)
        if call == 2:
            expected = 0.5 * expected
    assert torch.equal(got, expected)


def test_replays_of_one_capture_serve_solvers_of_as_many_slots(recorded):  # noqa: F811
    """Of other schedules, orders, numbers of steps and beginnings."""
    sampler = Sampler(Model(), fastguide.dpm_solver(SCHEDULE, 6), ClassifierFree(2.0))
    for table in (
        fastguide.dpm_solver(SCHEDULE, 6),
        fastguide.dpm_solver(fastguide.NoiseSchedule.cosine(), 9, sigma_spacing="karras"),
        fastguide.deis(SCHEDULE, 5),
        fastguide.dpm_solver_singlestep(SCHEDULE, 7, begin=2),
        fastguide.dpm_solver(SCHEDULE, 6),
    ):
        sampler.table = table
        assert torch.equal(sampler(x_T(), **FREE), by_steps(table, x_T()))
    assert recorded.captured == 1
