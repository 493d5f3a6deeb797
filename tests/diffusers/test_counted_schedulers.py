"""Schedulers that count their steps, beside diffusers' own: whole loops, states, and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from fastguide.diffusers.two_calls import TwoCalls
from tests.support.counted_loops import BETAS, CASES, ENDS, FLOW, STEPS, first_of, largest_error, loop, model
from tests.support.scheduler_pair import COUNTED, SHAPE, diffusers, fused, pair, randn, set_steps, steps_of


@pytest.mark.parametrize("begin", [None, 1, 4, 7])
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
    in_a_step = begin is not None and begin % 2 and isinstance(ours, TwoCalls)
    assert ours._counted.made.why_not == ("a loop that begins in the middle of a step" if in_a_step else None)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("begin", range(STEPS))
def test_pndm_begins_anywhere_as_diffusers_does(begin, prediction_type):
    """At the timestep that is there twice as well, where diffusers repeats another step than the first."""
    ours, theirs = pair("PNDMScheduler", skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type)
    got, expected = (loop(each, 0.1 * randn(*SHAPE), begin=begin) for each in (ours, theirs))
    assert largest_error(got, expected) < 5e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("kind", ["UniPC", "DPMSolver", "DEIS"])
def test_models_of_noise_or_of_x_0_at_the_levels_of_a_flow_are_diffusers(kind, prediction_type):
    """SkyReels' tests in diffusers have models of noise."""
    config = FLOW | {"flow_shift": 8.0, "prediction_type": prediction_type}
    ours, theirs = pair(f"{kind}MultistepScheduler", **config)
    set_steps(ours)
    first = first_of(ours)
    got, expected = (loop(each, first) for each in (ours, theirs))
    assert largest_error(got, expected) < (1e-5 if kind == "DEIS" else 2e-6)
    assert ours._counted.made.why_not is None


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
            states = []

            def note(x, number, scheduler=scheduler, states=states):
                loop_under_way = getattr(scheduler, "_counted", None)
                states.append(x if loop_under_way is None or loop_under_way.state is None else loop_under_way.state)
                assert x.dtype == torch.bfloat16
                return x

            loop(scheduler, first.bfloat16(), dtype=torch.bfloat16, steps=40, edit=note)
            state = states[-2]  # after its last step, a loop keeps nothing
            assert state.dtype == (torch.float32 if label == "ours" else torch.bfloat16)
            errors.setdefault(label, []).append(((state.double() - exact).norm() / exact.norm()).item())
    mean = {label: sum(values) / len(values) for label, values in errors.items()}
    assert mean["theirs"] > 3 * mean["ours"]
    assert mean["rounded"] > 2 * mean["ours"]


def in_float64(scheduler, first):
    """All but the last step in float64 with a model whose output is rounded to bfloat16, from the rounded noise on."""
    x, table = first.bfloat16().double(), fused.step_table(scheduler, 40)
    for call, t in enumerate(table.timesteps[:-1]):
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


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_timestep_that_is_not_the_counter_s_is_taken_as_diffusers_does(name):
    """From the timestep that it is given, to the one that the counter leads to."""
    results = []
    for scheduler in pair(name):
        set_steps(scheduler, 6)
        scheduler.set_begin_index(0)
        x, seen = randn(*SHAPE), []
        for t in (scheduler.timesteps[2], int(scheduler.timesteps[1]) + 7, scheduler.timesteps[2]):
            x = scheduler.step(model(x, t, 1.0), t, x, generator=torch.Generator().manual_seed(1))[0]
            seen.append((x, None))
        results.append(seen)
    assert largest_error(*results) < 2e-6


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"])
def test_a_counter_that_is_set_back_begins_another_loop(name):
    """And one that is found again where it was goes on."""
    scheduler, fresh = getattr(fused, name)(**BETAS), getattr(fused, name)(**BETAS)
    expected = [x for x, _ in loop(fresh, first_of(fresh))]
    loop(scheduler, first_of(scheduler))
    scheduler._step_index, x = None, first_of(scheduler)
    for number, t in enumerate(scheduler.timesteps):
        if number == 4:
            scheduler._step_index = None
        given = scheduler.scale_model_input(x, t)
        uncond, cond = (model(given, t, value) for value in (0.0, 1.0))
        x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
        torch.testing.assert_close(x, expected[number])


def test_options_of_a_step_may_be_tensors():
    """What they are when the step is made counts, not which tensor it is."""
    noise, (ours, theirs) = torch.tensor(1.0), pair("EulerDiscreteScheduler", **BETAS)
    results = []
    for scheduler in (ours, theirs):
        noise.fill_(1.0)
        seen, generator = [], torch.Generator().manual_seed(1)
        for _ in range(2):
            set_steps(scheduler, 5)
            x = first_of(scheduler)
            for t in scheduler.timesteps:
                x = scheduler.step(
                    model(scheduler.scale_model_input(x, t), t, 1.0),
                    t,
                    x,
                    s_churn=2.0,
                    s_noise=noise,
                    generator=generator,
                ).prev_sample
            seen.append((x, None))
            noise.fill_(1.5)
        results.append(seen)
    assert largest_error(*results) < 5e-6


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_finished_loop_keeps_no_tensors(name):
    scheduler = getattr(fused, name)(**BETAS)
    loop(scheduler, first_of(scheduler), dtype=torch.bfloat16)
    counted = scheduler._counted
    assert (counted.returned, counted.state, counted.staged, counted.history) == (None, None, None, None)


def test_a_float32_state_that_is_turned_off_in_the_middle_is_dropped():
    scheduler = fused.FlowMatchEulerDiscreteScheduler()

    def turn_off(x, number):
        scheduler.float32_state = number < 4
        return x

    got = loop(scheduler, first_of(scheduler).bfloat16(), dtype=torch.bfloat16, edit=turn_off)
    for number, (x, _) in enumerate(got):
        assert x.dtype == torch.bfloat16, number
    assert scheduler._counted.state is None
    scheduler.float32_state = True
    again = loop(scheduler, first_of(scheduler).bfloat16(), dtype=torch.bfloat16)
    assert torch.equal(got[4][0], again[4][0])
    assert not torch.equal(got[-1][0], again[-1][0])


@pytest.mark.parametrize("t", [3, 321.0])
def test_sa_solver_takes_a_first_timestep_that_is_not_the_counter_s_as_diffusers_does(t):
    results = []
    for scheduler in pair("SASolverScheduler", **BETAS):
        set_steps(scheduler, 6)
        x = scheduler.step(randn(*SHAPE), t, randn(*SHAPE, seed=1), generator=torch.Generator().manual_seed(1))[0]
        results.append([(x, None)])
    assert largest_error(*results) == 0.0
    scheduler = fused.SASolverScheduler(**BETAS)
    set_steps(scheduler, 6)
    x = scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE)).prev_sample
    with pytest.raises(RuntimeError, match=r"timestep: expected that of the loop's next step, 832, got 3"):
        scheduler.step(randn(*SHAPE), 3, x)


def test_a_consistency_model_s_timestep_may_be_a_number():
    results = []
    for scheduler in pair("CMStochasticIterativeScheduler"):
        set_steps(scheduler, 4)
        x, t = first_of(scheduler), float(scheduler.timesteps[1])
        scheduler.scale_model_input(x, t)
        x = scheduler.step(randn(*SHAPE), t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        results.append([(x, None)])
    assert largest_error(*results) < 2e-6


def test_pndm_may_be_set_back():
    scheduler = fused.PNDMScheduler(skip_prk_steps=True)
    expected = loop(scheduler, randn(*SHAPE))[-1][0]
    scheduler._step_index, x = None, randn(*SHAPE)
    for t in scheduler.timesteps:
        uncond, cond = (model(x, t, value) for value in (0.0, 1.0))
        x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    assert torch.equal(x, expected)
    scheduler.set_timesteps(STEPS)
    x = scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE)).prev_sample
    scheduler.step(randn(*SHAPE), scheduler.timesteps[1], x)
    with pytest.raises(RuntimeError, match=r"timestep: expected that of call 2 of the loop, 830, got 250"):
        scheduler.step(randn(*SHAPE), 250, x)


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_a_step_after_the_last_is_refused(name):
    scheduler = getattr(fused, name)()
    x = loop(scheduler, randn(*SHAPE))[-1][0]
    with pytest.raises(IndexError, match="step: expected no more than the 12 of this loop, got another one"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_what_a_loop_does_not_go_on_with_is_named():
    scheduler = fused.UniPCMultistepScheduler(**BETAS)
    scheduler.set_timesteps(STEPS)
    x = scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE)).prev_sample
    with pytest.raises(RuntimeError, match=r"of \(2, 3, 8, 8\) in float32 or less .* of \(2, 3, 8, 8\) in float64;"):
        scheduler.step(x.double(), scheduler.timesteps[1], x.double())


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
        ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 0.5}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, **ENDS}),
        ("SASolverScheduler", {"predictor_order": 4}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
        ("PNDMScheduler", {}),
    ):
        ours, theirs = pair(name, **BETAS, **config)
        got, expected = (
            loop(each, randn(*SHAPE), generator=torch.Generator().manual_seed(1)) for each in (ours, theirs)
        )
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for (a, _), (b, _) in zip(got, expected, strict=True))
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


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
}


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("dpm sde", "cosine"))])
def test_a_copy_in_the_middle_of_a_loop_goes_on_as_the_loop_does(case, at):
    """And neither disturbs the other. A path of Brownian motion is not copied in its middle, and pickle takes no
    SA-Solver of diffusers, which has a function of its own.
    """
    name, config, options = CASES[case]
    scheduler, generator, copies = getattr(fused, name)(**config), torch.Generator().manual_seed(3), {}

    def copied(x, number):
        if number == at:
            ways = [how for how in COPIES if not (case.startswith("sa") and how == "pickle")]
            copies.update({how: (COPIES[how](scheduler), x.clone(), generator.get_state()) for how in ways})
        return x

    first = first_of(scheduler)
    expected = [x for x, _ in loop(scheduler, first, edit=copied, generator=generator, options=options)]
    for how, (other, x, state) in copies.items():
        generator.set_state(state)
        arguments = dict(options)
        if "generator" in inspect.signature(other.step).parameters:
            arguments["generator"] = generator
        for number, t in enumerate(steps_of(other)[at + 1 :], start=at + 1):
            given = other.scale_model_input(x, t) if hasattr(other, "scale_model_input") else x
            uncond, cond = (model(given, t, value) for value in (0.0, 1.0))
            x = other.step(uncond + 3.0 * (cond - uncond), t, x, **arguments).prev_sample
            torch.testing.assert_close(
                x, expected[number], rtol=1e-5, atol=1e-5, msg=lambda text, how=how: f"{how}: {text}"
            )


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
