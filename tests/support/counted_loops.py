"""Loops over schedulers that count their steps, and the configurations that they are compared with diffusers in."""

from __future__ import annotations

import inspect

import torch

from tests.support.scheduler_pair import SHAPE, randn, set_steps, steps_of

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
ENDS = {"lower_order_final": True}
STEPS = 12

CASES = {  # name, configuration, options of step
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "flow stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    "flow stochastic inverted": (
        "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "invert_sigmas": True}, {},
    ),
    "flow inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {}),
    "flow terminal karras": (
        "FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1, "use_karras_sigmas": True}, {},
    ),
    "euler": ("EulerDiscreteScheduler", BETAS, {}),
    "euler v churn": (
        "EulerDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction", "use_karras_sigmas": True},
        {"s_churn": 4.0, "s_noise": 1.01},
    ),
    "euler sample churn in a window": (
        "EulerDiscreteScheduler", {**BETAS, "prediction_type": "sample"},
        {"s_churn": 4.0, "s_tmin": 0.5, "s_tmax": 6.0},
    ),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", BETAS, {}),
    "euler sample": ("EulerDiscreteScheduler", {**BETAS, "prediction_type": "sample"}, {}),
    "heun sample": ("HeunDiscreteScheduler", {**BETAS, "prediction_type": "sample"}, {}),
    "lms sample": ("LMSDiscreteScheduler", {**BETAS, "prediction_type": "sample"}, {}),
    "dpm++ 2m sample": ("DPMSolverMultistepScheduler", {**BETAS, "prediction_type": "sample"}, {}),
    "dpm 2m": (
        "DPMSolverMultistepScheduler",
        {**BETAS, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {},
    ),
    "dpm 2m sde v": (
        "DPMSolverMultistepScheduler",
        {**BETAS, "algorithm_type": "sde-dpmsolver", "prediction_type": "v_prediction",
         "final_sigmas_type": "sigma_min"}, {},
    ),
    "dpm++ 2s sde sample": (
        "DPMSolverSinglestepScheduler",
        {**BETAS, **ENDS, "algorithm_type": "sde-dpmsolver++", "prediction_type": "sample"}, {},
    ),
    "heun": ("HeunDiscreteScheduler", {**BETAS, "clip_sample": True}, {}),
    "dpm2": ("KDPM2DiscreteScheduler", BETAS, {}),
    "dpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {**BETAS, "timestep_spacing": "trailing"}, {}),
    "lms": ("LMSDiscreteScheduler", BETAS, {}),
    "lms of order 2": ("LMSDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}, {"order": 2}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", BETAS, {}),
    "dpm++ 3m karras": ("DPMSolverMultistepScheduler", {**BETAS, "solver_order": 3, "use_karras_sigmas": True}, {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++ 2m flow": ("DPMSolverMultistepScheduler", FLOW, {}),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", {**BETAS, **ENDS}, {}),
    "dpm++ 3s flow": ("DPMSolverSinglestepScheduler", {**FLOW, **ENDS, "solver_order": 3}, {}),
    "dpm++ 2s sde": ("DPMSolverSinglestepScheduler", {**BETAS, **ENDS, "algorithm_type": "sde-dpmsolver++"}, {}),
    "unipc": ("UniPCMultistepScheduler", {**BETAS, "final_sigmas_type": "zero"}, {}),
    "unipc 3 bh1": ("UniPCMultistepScheduler", {**BETAS, "solver_order": 3, "solver_type": "bh1",
                                                "final_sigmas_type": "sigma_min"}, {}),
    "unipc wan": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 5.0, "final_sigmas_type": "zero"}, {}),
    "deis": ("DEISMultistepScheduler", BETAS, {}),
    "pndm": ("PNDMScheduler", {**BETAS, "skip_prk_steps": True, "steps_offset": 1}, {}),
    "pndm v": ("PNDMScheduler", {**BETAS, "skip_prk_steps": True, "prediction_type": "v_prediction"}, {}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
    "flow heun churn": (
        "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 0.9},
    ),
    "flow lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}, {}),
    "flow lcm inverted": ("FlowMatchLCMScheduler", {"invert_sigmas": True}, {}),
    "flow map": ("FlowMapEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "flow ancestral": ("LTXEulerAncestralRFScheduler", {"eta": 0.6, "s_noise": 1.1}, {}),
    "flow ancestral without noise": ("LTXEulerAncestralRFScheduler", {"eta": 0.0}, {}),
    "helios": ("HeliosScheduler", {"stages": 1, "shift": 3.0}, {}),
    "helios, some not corrected": ("HeliosScheduler", {"stages": 1, "disable_corrector": [3]}, {}),
    "helios full order at the end": ("HeliosScheduler", {"stages": 1, "lower_order_final": False}, {}),
    "helios euler": ("HeliosScheduler", {"stages": 1, "scheduler_type": "euler", "shift": 3.0}, {}),
    "edm euler": ("EDMEulerScheduler", {}, {}),
    "edm euler v churn": (
        "EDMEulerScheduler", {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
        {"s_churn": 3.0, "s_noise": 1.01, "s_tmax": 50.0},
    ),
    "edm dpm++ 2m": ("EDMDPMSolverMultistepScheduler", {}, {}),
    "edm dpm++ 3m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "sigma_schedule": "exponential"}, {}),
    "edm dpm++ 2m sde heun": (
        "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {},
    ),
    "lcm": ("LCMScheduler", {}, {}),
    "lcm v clipped": ("LCMScheduler", {"prediction_type": "v_prediction", "clip_sample": True}, {}),
    "tcd": ("TCDScheduler", {}, {}),
    "tcd v": ("TCDScheduler", {"prediction_type": "v_prediction"}, {"eta": 0.7}),
    "tcd deterministic": ("TCDScheduler", {"prediction_type": "sample"}, {"eta": 0.0}),
    "scm": ("SCMScheduler", {}, {}),
    "cm": ("CMStochasticIterativeScheduler", {}, {}),
    "ipndm": ("IPNDMScheduler", {}, {}),
    "dpm sde": ("DPMSolverSDEScheduler", {**BETAS, "noise_sampler_seed": 5}, {}),
    "dpm sde v karras": (
        "DPMSolverSDEScheduler",
        {**BETAS, "prediction_type": "v_prediction", "use_karras_sigmas": True, "noise_sampler_seed": 5},
        {"s_noise": 1.1},
    ),
    "cosine": ("CosineDPMSolverMultistepScheduler", {}, {}),
    "cosine 1": ("CosineDPMSolverMultistepScheduler", {"solver_order": 1, "prediction_type": "epsilon"}, {}),
    "sa": ("SASolverScheduler", BETAS, {}),
    "sa flow": ("SASolverScheduler", FLOW, {}),
}  # fmt: skip


def model(x, t, condition):
    return torch.tanh(0.7 * x + 0.3 * condition + torch.sin(torch.as_tensor(t).float() / 50).to(x)) - 0.2 * x


def loop(
    scheduler, x, *, begin=None, dtype=None, generator=None, options=None, edit=None, steps=STEPS, stop=None,
    as_output=True,
):  # fmt: skip
    """Return each sample and predicted x_0, as a pipeline runs it, with a model that computes in ``dtype``."""
    set_steps(scheduler, steps)
    if begin is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    options = dict(options or {})
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    seen = []
    for number, t in enumerate(steps_of(scheduler)[begin or 0 : stop]):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        uncond, cond = (model(given.to(dtype or given.dtype), t, value) for value in (0.0, 1.0))
        result = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, **options, return_dict=as_output)
        x = result[0] if edit is None else edit(result[0], number)
        seen.append((x, result[1] if len(result) > 1 else None))
    return seen


def first_of(scheduler):
    return randn(*SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0))


def largest_error(ours, theirs):
    """And the dtypes are the same."""
    found = [0.0]
    for row, other in zip(ours, theirs, strict=True):
        for a, b in zip(row, other, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                assert a.dtype == b.dtype
                found.append(((a.double() - b.double()).norm() / b.double().norm()).item())
    return max(found)
