"""Solvers that go on from earlier calls name the argument, what was expected, and what came."""

from __future__ import annotations

import pytest

import fastguide
from fastguide import FlowSchedule, NoiseSchedule

VP, FLOW = NoiseSchedule.scaled_linear(), FlowSchedule()
OVER_SIGNAL = {  # solvers in the logarithm of the signal-to-noise ratio
    "dpm_solver": fastguide.dpm_solver,
    "dpm_solver_singlestep": fastguide.dpm_solver_singlestep,
    "unipc": fastguide.unipc,
    "deis": fastguide.deis,
    "sa_solver": fastguide.sa_solver,
}
OVER_SIGMA = {"heun": fastguide.heun, "dpm2": fastguide.dpm2, "lms": fastguide.lms}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1000, 5), {}, TypeError, "schedule: expected a NoiseSchedule or a FlowSchedule, got int"),
        ((VP,), {}, ValueError, "num_inference_steps: expected a number, or timesteps=, got None"),
        ((VP,), {"sigma_spacing": "karras"}, ValueError, "num_inference_steps: expected a number, got None"),
        ((FLOW,), {}, ValueError, "num_inference_steps: expected a number, or sigmas=, got None"),
        ((VP, 0), {}, ValueError, "num_inference_steps: expected a positive integer"),
        ((VP, 1000), {}, ValueError, "num_inference_steps: expected fewer than 1000, the timesteps, got 1000"),
        ((VP, 3), {"timesteps": [900, 5]}, ValueError, "num_inference_steps: expected 2, the timesteps', got 3"),
        ((VP,), {"timesteps": [5, 900]}, ValueError, "timesteps: expected strictly falling values"),
        ((VP,), {"timesteps": [1000, 5]}, ValueError, "timesteps: expected values from 0 to 999"),
        (
            (VP,),
            {"timesteps": [9], "sigma_spacing": "beta"},
            ValueError,
            "timesteps: expected None with sigma_spacing=",
        ),
        ((VP, 5), {"sigma_spacing": "lu"}, ValueError, "sigma_spacing: expected one of"),
        ((VP, 5), {"sigmas": [0.9, 0.5]}, ValueError, "sigmas: expected None with a NoiseSchedule"),
        ((VP, 5), {"mu": 1.0}, ValueError, "mu: expected None with a NoiseSchedule, got 1.0"),
        ((FLOW,), {"sigmas": [0.5, 0.9]}, ValueError, "sigmas: expected strictly falling values"),
        ((FLOW,), {"sigmas": [1.5, 0.9]}, ValueError, "sigmas: expected strictly falling values above 0 and up to 1"),
        ((FLOW, 5), {"timesteps": [5, 2]}, ValueError, "timesteps: expected None with a FlowSchedule"),
        ((FLOW, 5), {"sigma_spacing": "karras"}, ValueError, "sigma_spacing: expected None with a FlowSchedule"),
        ((FlowSchedule(invert_sigmas=True), 5), {}, ValueError, "schedule: expected a flow whose sigmas fall"),
        ((FlowSchedule(use_dynamic_shifting=True), 5), {}, ValueError, "mu: expected a number"),
        ((VP, 5), {"prediction_type": "flow_prediction"}, ValueError, "'flow_prediction' is epsilon - x_0 of flow"),
        ((VP, 5), {"prediction_type": "eps"}, ValueError, "prediction_type: expected one of"),
        ((VP, 5), {"begin": 5}, ValueError, "begin: expected a step from 0 to 4, got 5"),
        ((VP, 5), {"begin": -1}, ValueError, "begin: expected a step from 0 to 4, got -1"),
        ((VP, 5), {"begin": 1.0}, TypeError, "begin: expected an integer, got 1.0"),
    ],
)
@pytest.mark.parametrize("solver", OVER_SIGNAL)
def test_over_signal(solver, arguments, options, error, message):
    with pytest.raises(error, match=message):
        OVER_SIGNAL[solver](*arguments, **options)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("dpm_solver", {"solver_order": 4}, "solver_order: expected 1 to 3 with 'dpmsolver\\+\\+', got 4"),
        ("dpm_solver", {"solver_order": True}, "solver_order: expected 1 to 3"),
        ("dpm_solver", {"algorithm_type": "ddim"}, "algorithm_type: expected one of .* got 'ddim'"),
        ("dpm_solver", {"solver_type": "bh2"}, "solver_type: expected one of .* got 'bh2'"),
        (
            "dpm_solver",
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
            "solver_order: expected 1 to 2 with 'sde-dpmsolver', got 3",
        ),
        ("dpm_solver", {"algorithm_type": "dpmsolver"}, "final_sigmas_type: expected 'sigma_min' with 'dpmsolver'"),
        ("dpm_solver", {"final_sigmas_type": "none"}, "final_sigmas_type: expected one of"),
        ("dpm_solver", {"timestep_spacing": "even"}, "timestep_spacing: expected one of"),
        ("dpm_solver", {"lambda_min_clipped": 10.0}, "lambda_min_clipped: expected one below most"),
        (
            "dpm_solver_singlestep",
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            "solver_order: expected 1 to 2 with 'sde-dpmsolver\\+\\+', got 3",
        ),
        ("dpm_solver_singlestep", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type: expected one of"),
        (
            "dpm_solver_singlestep",
            {"lower_order_final": False},
            "lower_order_final: expected True, as 5 calls of order 2",
        ),
        ("unipc", {"solver_order": 4}, "solver_order: expected 1 to 3, got 4"),
        ("unipc", {"solver_order": 2.0}, "solver_order: expected 1 to 3, got 2.0"),
        ("unipc", {"disable_corrector": ["first"]}, "disable_corrector: expected steps, integers from 0 on"),
        ("unipc", {"disable_corrector": 0}, "disable_corrector: expected steps, integers from 0 on"),
        ("unipc", {"solver_type": "midpoint"}, "solver_type: expected one of .* got 'midpoint'"),
        ("unipc", {"predict_x0": False}, "final_sigmas_type: expected 'sigma_min' with predict_x0=False"),
        (
            "unipc",
            {"lower_order_final": False},
            "lower_order_final: expected True where the last step leads to sigma 0",
        ),
        ("deis", {"solver_order": 0}, "solver_order: expected 1 to 3, got 0"),
        ("sa_solver", {"predictor_order": 4}, "predictor_order: expected 1 to 3, got 4"),
        ("sa_solver", {"corrector_order": 5}, "corrector_order: expected 1 to 4, got 5"),
        ("sa_solver", {"algorithm_type": "x0"}, "algorithm_type: expected one of .* got 'x0'"),
        ("sa_solver", {"tau_func": lambda timestep: -1.0}, "tau_func: expected values from 0 on"),
    ],
)
def test_options_of_one(solver, options, message):
    with pytest.raises(ValueError, match=message):
        OVER_SIGNAL[solver](VP, 5, **options)


@pytest.mark.parametrize("solver", OVER_SIGNAL)
def test_flags_are_true_or_false(solver):
    with pytest.raises(TypeError, match="lower_order_final: expected True or False, got 1"):
        OVER_SIGNAL[solver](VP, 5, lower_order_final=1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("timestep_spacing", "trailing", "timestep_spacing: expected 'linspace' with a FlowSchedule, got 'trailing'"),
        ("steps_offset", 1, "steps_offset: expected 0 with a FlowSchedule, got 1"),
        ("lambda_min_clipped", -5.0, "lambda_min_clipped: expected -inf with a FlowSchedule, got -5.0"),
    ],
)
def test_options_of_noise_schedules_alone(option, value, message):
    with pytest.raises(ValueError, match=message):
        fastguide.dpm_solver(FLOW, 5, **{option: value})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((FLOW, 5), {}, TypeError, "schedule: expected a NoiseSchedule, got FlowSchedule"),
        ((VP,), {}, ValueError, "num_inference_steps: expected a number, or timesteps="),
        ((VP,), {"sigmas": [3.0, 1.0]}, ValueError, "sigmas: expected 0 at the end, got 1"),
        ((VP,), {"sigmas": [1.0, 3.0, 0.0]}, ValueError, "sigmas: expected strictly falling values"),
        ((VP, 5), {"sigma_spacing": "lu"}, ValueError, "sigma_spacing: expected one of"),
        ((VP, 5), {"prediction_type": "flow_prediction"}, ValueError, "'flow_prediction' is epsilon - x_0 of flow"),
        ((VP, 5), {"begin": 5}, ValueError, "begin: expected a step from 0 to 4, got 5"),
    ],
)
@pytest.mark.parametrize("solver", OVER_SIGMA)
def test_over_sigma(solver, arguments, options, error, message):
    with pytest.raises(error, match=message):
        OVER_SIGMA[solver](*arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastguide.lms(VP, 5, order=5), ValueError, "order: expected 1 to 4, got 5"),
        (lambda: fastguide.heun(VP, 5, clip_sample_range=-1.0), ValueError, "clip_sample_range: expected a positive"),
        (lambda: fastguide.dpm2(VP, 5, ancestral=1), TypeError, "ancestral: expected True or False, got 1"),
        (lambda: fastguide.flow_match_heun(VP, 5), TypeError, "schedule: expected a FlowSchedule, got NoiseSchedule"),
        (
            lambda: fastguide.flow_match_heun(FlowSchedule(invert_sigmas=True), 5),
            ValueError,
            "schedule: expected a flow whose sigmas fall",
        ),
        (lambda: fastguide.flow_match_heun(FLOW, 5, begin=5), ValueError, "begin: expected a step from 0 to 4, got 5"),
        (
            lambda: fastguide.flow_match_heun(FLOW, 5, prediction_type="epsilon"),
            ValueError,
            "prediction_type: 'epsilon' says nothing of x_0 at timestep 1000",
        ),
        (lambda: fastguide.pndm(FLOW, 5), TypeError, "schedule: expected a NoiseSchedule, got FlowSchedule"),
        (lambda: fastguide.pndm(VP, 5, begin=5), ValueError, "begin: expected a step from 0 to 4, got 5"),
        (
            lambda: fastguide.pndm(VP.rescale_zero_terminal_snr(), timesteps=[999, 500]),
            ValueError,
            "prediction_type: 'epsilon' says nothing of x_0 at timestep 999",
        ),
        (
            lambda: fastguide.edm_dpm_solver(5, algorithm_type="dpmsolver"),
            ValueError,
            "algorithm_type: expected one of",
        ),
        (
            lambda: fastguide.edm_dpm_solver(5, algorithm_type="sde-dpmsolver++", solver_order=3),
            ValueError,
            "solver_order: expected 1 to 2",
        ),
        (lambda: fastguide.edm_dpm_solver(5, begin=9), ValueError, "begin: expected a step from 0 to 4, got 9"),
        (lambda: fastguide.edm_dpm_solver(sigmas=[1.0, 2.0]), ValueError, "sigmas: expected strictly falling values"),
        (lambda: fastguide.cogvideox_dpm(FLOW, 5), TypeError, "schedule: expected a NoiseSchedule, got FlowSchedule"),
    ],
)
def test_others(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gradient_after_the_clip_has_no_use():
    for table in (fastguide.dpm_solver(VP, 5), fastguide.heun(VP, 5), fastguide.pndm(VP, 5)):
        assert "the gradient has to be a part of the x_0" in table.unused_forms["epsilon_after_clip"]
        assert "no variance" in table.unused_forms["mean"]
    assert "mean" not in fastguide.dpm_solver(VP, 5, algorithm_type="sde-dpmsolver++").unused_forms
    assert "zero signal at timestep 1000" in fastguide.flow_match_heun(FLOW, 5).unused_forms["epsilon"]


def test_more_than_three_entries_at_once_are_refused():
    from fastguide.schedules import Levels
    from fastguide.solvers import Entry, Form, history_columns

    levels = Levels.variance_exploding(fastguide.euler(VP, 6).levels.sigma)
    forms = [Form(entries=dict.fromkeys(range(call + 1), 1.0)) for call in range(6)]
    with pytest.raises(
        ValueError, match="history: expected at most 3 entries that are kept at once, got more at call 3"
    ):
        history_columns(forms, Entry.original(levels))
    with pytest.raises(ValueError, match="forms: expected entries of calls from 0 to 0 in call 0, got 1"):
        history_columns([Form(entries={1: 1.0}), *forms[1:]], Entry.original(levels))
    with pytest.raises(ValueError, match="forms: expected 6, one for each entry, got 2"):
        history_columns(forms[:2], Entry.original(levels))
