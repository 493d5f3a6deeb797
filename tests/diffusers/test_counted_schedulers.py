"""Schedulers that count their steps, beside diffusers' own: whole loops, states, and what is refused."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from tests.support.scheduler_pair import COUNTED, SHAPE, diffusers, fused, pair, randn, set_steps, steps_of

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


def loop(scheduler, x, *, begin=None, dtype=None, generator=None, options=None, edit=None, steps=STEPS):
    """Return each sample and predicted x_0, as a pipeline runs it, with a model that computes in ``dtype``."""
    set_steps(scheduler, steps)
    if begin is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    options = dict(options or {})
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    seen = []
    for number, t in enumerate(steps_of(scheduler)[begin or 0 :]):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        uncond, cond = (model(given.to(dtype or given.dtype), t, value) for value in (0.0, 1.0))
        result = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, **options)
        x = result.prev_sample if edit is None else edit(result.prev_sample, number)
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


@pytest.mark.parametrize("begin", [None, 4])
@pytest.mark.parametrize("case", CASES)
def test_loops_in_float32_are_diffusers(case, begin):
    """diffusers' own coefficients are in float32, in which DEIS' and SA-Solver's lose digits."""
    name, config, options = CASES[case]
    ours, theirs = pair(name, **config)
    set_steps(ours)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first = first_of(ours) if begin is None else randn(*SHAPE)
    got = loop(ours, first, begin=begin, generator=generators[0], options=options)
    expected = loop(theirs, first, begin=begin, generator=generators[1], options=options)
    assert largest_error(got, expected) < (1e-5 if name.startswith(("DEIS", "SA")) else 2e-6)
    assert torch.equal(*(generator.get_state() for generator in generators))
    count = "counter" if name.startswith("PNDM") else "step_index"
    assert getattr(ours, count) == getattr(theirs, count)
    assert ours._counted.table is not None


def test_one_step_of_a_consistency_model_draws_nothing():
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    got, expected = (
        loop(scheduler, randn(*SHAPE), generator=generator, steps=1)
        for scheduler, generator in zip(pair("CMStochasticIterativeScheduler"), generators, strict=True)
    )
    assert largest_error(got, expected) < 2e-6
    assert torch.equal(*(generator.get_state() for generator in generators))


def test_every_class_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(COUNTED)


@pytest.mark.parametrize("case", ["flow", "euler", "euler ancestral", "heun", "dpm++ 2m", "unipc wan", "lms", "deis"])
def test_dtypes_are_diffusers(case):
    """Of a model in bfloat16, with latents in bfloat16 and in float32."""
    name, config, options = CASES[case]
    for state in (torch.bfloat16, torch.float32):
        ours, theirs = pair(name, **config)
        ours.set_timesteps(STEPS)
        first = first_of(ours).to(state)
        arguments = {"dtype": torch.bfloat16, "options": options}
        got, expected = (
            loop(each, first, generator=torch.Generator().manual_seed(3), **arguments) for each in (ours, theirs)
        )
        assert largest_error(got[:1], expected[:1]) < 0.02


@pytest.mark.parametrize("case", ["flow", "euler"])
def test_a_state_in_float32_is_three_times_nearer_to_float64(case):
    """diffusers rounds the sample to bfloat16 after each step; with float32_state=False, so do these."""
    name, config, _ = CASES[case]
    ours, theirs = pair(name, **config)
    rounded = getattr(fused, name)(**config)
    rounded.float32_state = False
    errors = {}
    for seed in range(4):
        ours.set_timesteps(40)
        first = randn(*SHAPE, seed=seed) * float(getattr(ours, "init_noise_sigma", 1.0))
        exact = in_float64(ours, first)
        for label, scheduler in (("ours", ours), ("theirs", theirs), ("rounded", rounded)):
            last = loop(scheduler, first.bfloat16(), dtype=torch.bfloat16, steps=40)[-1][0]
            assert last.dtype == torch.bfloat16
            state = scheduler._counted.state if label == "ours" else last
            errors.setdefault(label, []).append(((state.double() - exact).norm() / exact.norm()).item())
    mean = {label: sum(values) / len(values) for label, values in errors.items()}
    assert mean["theirs"] > 3 * mean["ours"]
    assert mean["rounded"] > 2 * mean["ours"]


def in_float64(scheduler, first):
    """The loop in float64 with a model whose output is rounded to bfloat16, beginning at the rounded noise."""
    x, table = first.bfloat16().double(), fused.step_table(scheduler, 40)
    for call, t in enumerate(table.timesteps):
        given = (table.in_scales[call] * x).to(torch.bfloat16)
        uncond, cond = (model(given, t, value) for value in (0.0, 1.0))
        row = {name: float(values[call]) for name, values in table.coefficients().items()}
        m = uncond.double() + 3.0 * (cond.double() - uncond.double())
        x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
        x = row["out_x0"] * x0 + row["out_sample"] * x + row["out_pred"] * m
    return x


@pytest.mark.parametrize("case", ["heun", "dpm2", "dpm++ 2s", "unipc", "dpm++ 2m", "lms", "sa", "euler"])
def test_a_callback_that_exchanges_the_latents_is_as_with_diffusers(case):
    """By a tensor of its own: solvers that go back find the sample that they wrote."""
    name, config, options = CASES[case]
    ours, theirs = pair(name, **config)
    ours.set_timesteps(STEPS)

    def blend(x, number):
        return 0.8 * x + 0.2 * randn(*SHAPE, seed=9) if number in (3, 4, 7) else x

    got, expected = (
        loop(each, first_of(ours), edit=blend, generator=torch.Generator().manual_seed(3), options=options)
        for each in (ours, theirs)
    )
    assert largest_error(got, expected) < 5e-6


def test_a_second_call_with_other_steps_begins_anew():
    ours, theirs = pair("UniPCMultistepScheduler", **BETAS)
    for steps in (12, 7, 12):
        got, expected = (loop(each, randn(*SHAPE), steps=steps) for each in (ours, theirs))
        assert largest_error(got, expected) < 2e-6


def test_tables_that_are_changed_by_hand_are_noticed():
    ours, theirs = pair("EulerDiscreteScheduler", **BETAS)
    x, results = randn(*SHAPE), []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        scheduler.is_scale_input_called = True
        scheduler.sigmas.mul_(0.9)
        first = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
        scheduler.sigmas = scheduler.sigmas * 0.9
        results.append((first, scheduler.step(x, scheduler.timesteps[1], first).prev_sample))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_step_out_of_order_is_refused_where_steps_go_on_from_earlier_ones():
    scheduler = fused.DPMSolverMultistepScheduler(**BETAS)
    scheduler.set_timesteps(STEPS)
    x = scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE)).prev_sample
    with pytest.raises(RuntimeError, match="step: expected step 1 of the loop, with samples"):
        scheduler.step(randn(1, 3, 8, 8), scheduler.timesteps[1], randn(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"step: expected a step like those before it.*autograd"):
        scheduler.step(randn(*SHAPE).requires_grad_(), scheduler.timesteps[1], x)
    scheduler._step_index = 5
    with pytest.raises(RuntimeError, match=r"step: expected step 1 of the loop, .* got step 5"):
        scheduler.step(randn(*SHAPE), scheduler.timesteps[5], x)


def test_what_diffusers_refuses_is_refused():
    scheduler = fused.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="Passing integer indices"):
        scheduler.step(randn(*SHAPE), 3, randn(*SHAPE))
    unset = fused.DPMSolverMultistepScheduler(**BETAS)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        unset.step(randn(*SHAPE), 999, randn(*SHAPE))


def test_what_rows_do_not_express_is_left_to_diffusers():
    for name, config in (
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, **ENDS}),
        ("SASolverScheduler", {"predictor_order": 4}),
        ("PNDMScheduler", {}),
    ):
        ours, theirs = pair(name, **BETAS, **config)
        got, expected = (
            loop(each, randn(*SHAPE), generator=torch.Generator().manual_seed(1)) for each in (ours, theirs)
        )
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(got, expected, strict=True))
        assert ours._counted.table is None


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode(name, dtype):
    """torch counts no writes to its tensors: what a step returns is one that it does, so that an edit is seen."""

    def edit(x, number):
        return x.mul_(0.5) if number == 4 else x

    results = []
    for scheduler in pair(name):
        with torch.inference_mode():
            first = randn(*SHAPE).to(dtype)
            generator = torch.Generator().manual_seed(2)
            results.append(loop(scheduler, first, dtype=dtype, edit=edit, generator=generator))
    assert not any(x.is_inference() for x, _ in results[0])
    assert largest_error(*results) < (2e-6 if dtype == torch.float32 else 0.05)


def test_autograd_is_left_to_diffusers():
    ours, theirs = pair("FlowMatchEulerDiscreteScheduler")
    gradients = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        output = randn(*SHAPE, seed=1).requires_grad_()
        scheduler.step(output, scheduler.timesteps[0], randn(*SHAPE)).prev_sample.sum().backward()
        gradients.append(output.grad)
    assert torch.equal(*gradients)


def test_a_copy_in_the_middle_of_a_loop_begins_its_own():
    scheduler = fused.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(STEPS)
    x, t = randn(*SHAPE), scheduler.timesteps
    scheduler.is_scale_input_called = True
    first = scheduler.step(x, t[0], x).prev_sample
    copied = copy.deepcopy(scheduler)
    assert torch.equal(copied.step(x, t[1], first).prev_sample, scheduler.step(x, t[1], first).prev_sample)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("pndm")])
def test_the_counter_is_found_without_waiting_for_the_device(case):
    """``timesteps`` are on a device whose values cannot be read; each of them is known by its place."""
    name, config, _ = CASES[case]
    ours, theirs = pair(name, **config)
    set_steps(ours, device="meta")
    set_steps(theirs)
    for place in (0, 5):
        ours._step_index = theirs._step_index = None
        ours._init_step_index(ours.timesteps[place])
        theirs._init_step_index(theirs.timesteps[place])
        assert ours.step_index == theirs.step_index
    assert ours.timesteps.device.type == "meta"


def test_diffusers_would_wait():
    """So the test above has teeth."""
    theirs = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    theirs.set_timesteps(STEPS)
    theirs.timesteps = theirs.timesteps.to("meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        theirs._init_step_index(theirs.timesteps[0])
