"""Whole loops in float32 stay as near to diffusers' in float64 as float32 allows."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.diffusers_in_float64 import SHAPE, diffusers, in_float64, model, relative

VP = fastguide.NoiseSchedule.scaled_linear()
FLOW = fastguide.FlowSchedule(shift=3.0)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOWS = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
TOLERANCE = 2e-6

LOOPS = {  # table, diffusers' scheduler, its configuration, its number of steps
    "ddim": (fastguide.ddim(VP, 50), "DDIM", {**BETAS, "clip_sample": False}, 50),
    "flow euler": (fastguide.flow_match_euler(FLOW, 28), "FlowMatchEulerDiscrete", {"shift": 3.0}, 28),
    "flow heun": (fastguide.flow_match_heun(FLOW, 28), "FlowMatchHeunDiscrete", {"shift": 3.0}, 28),
    "euler": (fastguide.euler(VP, 50), "EulerDiscrete", BETAS, 50),
    "heun": (fastguide.heun(VP, 25, sigma_spacing="karras"), "HeunDiscrete", {**BETAS, "use_karras_sigmas": True}, 25),
    "dpm2": (fastguide.dpm2(VP, 25), "KDPM2Discrete", BETAS, 25),
    "lms": (fastguide.lms(VP, 50), "LMSDiscrete", BETAS, 50),
    "pndm": (fastguide.pndm(VP, 50, steps_offset=1), "PNDM", {**BETAS, "skip_prk_steps": True, "steps_offset": 1}, 50),
    "dpm++ 2m": (fastguide.dpm_solver(VP, 25), "DPMSolverMultistep", BETAS, 25),
    "dpm++ 3m": (fastguide.dpm_solver(VP, 25, solver_order=3), "DPMSolverMultistep", {**BETAS, "solver_order": 3}, 25),
    "dpm++ 2m flow": (fastguide.dpm_solver(FLOW, 20), "DPMSolverMultistep", FLOWS, 20),
    "dpm++ 2s": (
        fastguide.dpm_solver_singlestep(VP, 24), "DPMSolverSinglestep", {**BETAS, "lower_order_final": True}, 24,
    ),
    "dpm 2m": (
        fastguide.dpm_solver(VP, 25, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), "DPMSolverMultistep",
        {**BETAS, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 25,
    ),
    "unipc 2": (fastguide.unipc(VP, 25), "UniPCMultistep", {**BETAS, "final_sigmas_type": "zero"}, 25),
    "unipc 3": (
        fastguide.unipc(VP, 25, solver_order=3), "UniPCMultistep",
        {**BETAS, "final_sigmas_type": "zero", "solver_order": 3}, 25,
    ),
    "unipc 2 flow": (fastguide.unipc(FLOW, 50), "UniPCMultistep", {**FLOWS, "final_sigmas_type": "zero"}, 50),
    "deis": (fastguide.deis(VP, 25), "DEISMultistep", BETAS, 25),
    "edm dpm++": (fastguide.edm_dpm_solver(18), "EDMDPMSolverMultistep", {}, 18),
    "edm euler": (fastguide.edm_euler(18), "EDMEuler", {}, 18),
}  # fmt: skip


def in_float32(table, x, backend):
    """The loop on a sample, a history and predictions of float32."""
    history = fastguide.History(table, x) if table.history_slots else None
    staged, guidance = torch.empty_like(x), fastguide.ClassifierFree(3.0)
    given = (table.first_in_scale * x.double()).float()
    for call, t in enumerate(table.host_timesteps):
        predictions = [model(given.double(), t, condition).float() for condition in (0.0, 1.0)]
        x = fastguide.guided_step(
            table, call, x, predictions, guidance, staged=staged, history=history, backend=backend
        )
        given = staged
    return x


@pytest.mark.parametrize("name", LOOPS)
def test_the_end_of_a_loop(name, backend):
    table, scheduler_name, config, steps = LOOPS[name]
    scheduler_class = getattr(diffusers, f"{scheduler_name}Scheduler")
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    with in_float64(scheduler_class):
        scheduler = scheduler_class(**config)
        scheduler.set_timesteps(steps)
        first = (float(getattr(scheduler, "init_noise_sigma", 1.0)) * noise.double()).float()
        x = first.double()
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            uncond, cond = model(given, t, 0.0), model(given, t, 1.0)
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    assert relative(in_float32(table, first, backend).double(), x) <= TOLERANCE
