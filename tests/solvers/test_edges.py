"""Solvers at the ends of their ranges: steps of no length, large tau, no signal, and arguments that change later."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

import fastguide
from fastguide import FlowSchedule, History, NoiseSchedule, guided_step
from fastguide.schedules.sigmas import spaced_sigmas
from fastguide.solvers._quadrature import lagrange_integrals
from tests.support.diffusers_in_float64 import in_float64

FLOW_CONFIG = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SAME_AS = {
    fastguide.dpm_solver: diffusers.DPMSolverMultistepScheduler,
    fastguide.dpm_solver_singlestep: diffusers.DPMSolverSinglestepScheduler,
    fastguide.unipc: diffusers.UniPCMultistepScheduler,
    fastguide.deis: diffusers.DEISMultistepScheduler,
    fastguide.sa_solver: diffusers.SASolverScheduler,
}


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_spaced_sigmas_begin_and_end_to_the_last_digit(spacing):
    for sigma_max in (0.7 + 0.1, 14.6, 80.0, 157.3):
        sigmas = spaced_sigmas(spacing, 7, sigma_max, 0.1 / 3)
        assert (sigmas[0].item(), sigmas[-1].item()) == (sigma_max, 0.1 / 3)


@pytest.mark.parametrize("algorithm_type", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.scaled_linear()])
def test_stochastic_steps_that_stay_at_sigma_min(schedule, algorithm_type):
    for spacing in ("karras", "exponential", "beta"):
        options = {"sigma_spacing": spacing, "final_sigmas_type": "sigma_min"}
        table = fastguide.dpm_solver(schedule, 12, algorithm_type=algorithm_type, **options)
        assert table.coefficients()["out_noise"][-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", SAME_AS, ids=lambda solver: solver.__name__)
def test_the_model_is_told_the_timesteps_of_diffusers(solver, shift):
    with in_float64(SAME_AS[solver]):
        scheduler = SAME_AS[solver](**FLOW_CONFIG, flow_shift=shift)
        for steps in range(2, 61):
            scheduler.set_timesteps(steps)
            assert solver(FlowSchedule(shift=shift), steps).timesteps.tolist() == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("growth", [0.5, 20.0, 400.0])
def test_integrals_under_an_exponential_of_any_growth(growth):
    """The integral of e^(growth u) over [-2, 0], and of u times that, in closed form."""
    mean = -math.expm1(-2 * growth) / growth
    first = (2 * math.exp(-2 * growth) - mean) / growth
    weights = lagrange_integrals([0.0, -1.0], -2.0, 0.0, growth)
    assert weights == pytest.approx([mean + first, -first], rel=1e-12)


def test_a_large_tau_replaces_the_sample_by_noise():
    """With all noise drawn anew, a step of order 1 is x' = alpha' x_0 + sigma' z, whatever the sample was."""
    table = fastguide.sa_solver(
        NoiseSchedule.scaled_linear(), 10, predictor_order=1, corrector_order=1, tau_func=lambda timestep: 30.0
    )
    columns = table.coefficients()
    alpha, sigma = table.levels
    assert columns["out_noise"][:-1].numpy() == pytest.approx(sigma[1:].numpy(), rel=1e-12)
    assert columns["out_sample"][0].item() == pytest.approx(0.0, abs=1e-12)
    assert columns["out_x0"][0].item() == pytest.approx(alpha[1].item(), rel=1e-12)


def test_pndm_begins_where_there_is_signal():
    with pytest.raises(ValueError, match="timesteps: expected some signal where a step begins"):
        fastguide.pndm(
            NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
            5,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        )


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "sample", "v_prediction"])
def test_churned_flows_predict_the_original_from_the_churned_sample(prediction_type, generator):
    """The x_0 that a step returns is that of the sample with its noise, of which the model has seen nothing yet."""
    table = fastguide.flow_match_heun(
        FlowSchedule(), sigmas=[0.9, 0.6, 0.3], prediction_type=prediction_type, s_churn=2.0
    )
    columns = table.coefficients()
    slope_of_x0 = columns["x0_scale"] * columns["x0_sample"]
    assert columns["x0_noise"].tolist() == (columns["out_noise"] * slope_of_x0).tolist()
    assert bool((columns["out_noise"] > 0).any())
    sample, prediction, noise = torch.randn(3, 1, 5, dtype=torch.float64, generator=generator)
    original = torch.empty_like(sample)
    guided_step(table, 0, sample, prediction, noise=noise, history=History(table, sample), original=original)
    churned = sample + columns["out_noise"][0] * noise
    expected = columns["x0_scale"][0] * (columns["x0_sample"][0] * churned + columns["x0_pred"][0] * prediction)
    assert original.numpy() == pytest.approx(expected.numpy(), rel=1e-12)


def test_a_table_begins_later_with_the_arguments_it_was_made_with():
    timesteps, as_tensor = [900, 600, 300], torch.tensor([900, 600, 300])
    tables = [fastguide.dpm_solver(NoiseSchedule.linear(), timesteps=given) for given in (timesteps, as_tensor)]
    timesteps[1], as_tensor[1] = 500, 500
    sampler = fastguide.Sampler(lambda x, t: 0.1 * x, tables[0])
    image = torch.ones(1, 4)
    for table in tables:
        sampler.table = table
        seen: list[float] = []
        sampler(torch.zeros(1, 4), image=image, strength=0.7, callback=lambda call, t, x, seen=seen: seen.append(t))
        assert seen == [600, 300]


def test_columns_are_copied():
    timesteps = torch.tensor([2, 1])
    table = fastguide.StepTable.from_columns(timesteps, {"out_sample": torch.ones(2, dtype=torch.float64)})
    timesteps[0] = 7
    assert table.timesteps.tolist() == [2, 1]


def test_a_history_may_be_of_a_subclass(generator):
    class Counted(History):
        pass

    table = fastguide.dpm_solver(NoiseSchedule.linear(), 3)
    x = torch.randn(1, 4, generator=generator)
    results = []
    for kind in (History, Counted):
        sample, history = x, kind(table, x)
        for call in range(3):
            sample = guided_step(table, call, sample, 0.1 * sample, history=history)
        results.append(sample)
    assert torch.equal(*results)
