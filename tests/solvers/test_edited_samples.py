"""A caller changes the sample between two calls: with the anchor, solvers do as diffusers; without, they honour it."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.diffusers_in_float64 import SHAPE, TOLERANCE, diffusers, in_float64, model, relative

VP = fastguide.NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LOOPS = {
    "unipc": (fastguide.unipc(VP, 12), "UniPCMultistep", {**BETAS, "final_sigmas_type": "zero"}),
    "heun": (fastguide.heun(VP, 12), "HeunDiscrete", BETAS),
    "dpm2": (fastguide.dpm2(VP, 12), "KDPM2Discrete", BETAS),
    "dpm++ 2s": (fastguide.dpm_solver_singlestep(VP, 12), "DPMSolverSinglestep", {**BETAS, "lower_order_final": True}),
    "pndm": (fastguide.pndm(VP, 12), "PNDM", {**BETAS, "skip_prk_steps": True}),
    "dpm++ 2m": (fastguide.dpm_solver(VP, 12), "DPMSolverMultistep", BETAS),
    "lms": (fastguide.lms(VP, 12), "LMSDiscrete", BETAS),
}


def edit(x, call, once):
    """A soft blend with something known, at every call or at one."""
    return x if once not in (None, call) else 0.7 * x + 0.3 * torch.sin(torch.arange(x.numel()).view_as(x).double())


def theirs(name, first, once):
    _, scheduler_name, config = LOOPS[name]
    scheduler_class = getattr(diffusers, f"{scheduler_name}Scheduler")
    with in_float64(scheduler_class):
        scheduler = scheduler_class(**config)
        scheduler.set_timesteps(12)
        x = first
        for call, t in enumerate(scheduler.timesteps):
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = edit(scheduler.step(model(given, t, 1.0), t, x).prev_sample, call, once)
    return x


def ours(name, first, once, anchored, backend="reference"):
    table = LOOPS[name][0]
    x, written, history = first, None, fastguide.History(table, first)
    for call, t in enumerate(table.host_timesteps):
        anchor = written if anchored else None
        written = fastguide.guided_step(
            table, call, x, model(table.in_scales[call] * x, t, 1.0), history=history, anchor=anchor, backend=backend
        )
        x = edit(written, call, once)
    return x


@pytest.mark.parametrize("once", [None, 3, 4])
@pytest.mark.parametrize("name", LOOPS)
def test_with_the_anchor_the_edit_is_diffusers(name, once):
    table = LOOPS[name][0]
    first = table.init_noise_sigma * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert relative(ours(name, first, once, True), theirs(name, first, once)) <= TOLERANCE


def test_without_it_the_step_goes_on_from_the_edit():
    """diffusers' UniPC goes on from the sample that it has kept, and only the model sees the edit."""
    first = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    honoured, dropped = ours("unipc", first, 5, False), theirs("unipc", first, 5)
    assert relative(honoured, dropped) > 0.05
    again = ours("dpm++ 2m", first, 5, False)  # which never goes back
    assert relative(again, theirs("dpm++ 2m", first, 5)) <= TOLERANCE
