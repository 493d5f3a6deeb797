"""Spacings of sigmas and the schedules of flow matching, against formulas written out here and against diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastguide import NoiseSchedule
from fastguide.schedules import FlowSchedule, linear_quadratic_sigmas, spaced_sigmas
from fastguide.schedules._beta_quantile import beta_quantile, cumulative_beta
from fastguide.schedules.sigmas import sigmas_at, timesteps_at
from tests.support.diffusers_in_float64 import diffusers, in_float64


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 3.0), (0.3, 5.0)])
def test_the_quantile_of_beta_is_scipy_s(a, b):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for p in [0.0, 1e-12, 1e-6, *np.linspace(0, 1, 101)[1:-1], 1 - 1e-6, 1.0]:
        assert beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-12)
        assert cumulative_beta(p, a, b) == pytest.approx(stats.beta.cdf(p, a, b), rel=1e-12)


def test_the_quantile_of_beta_inverts_its_distribution():
    """Beta(1/2, 1/2) is the arcsine distribution: the quantile of p is sin(pi p / 2)^2."""
    for p in np.linspace(0.01, 0.99, 33):
        assert beta_quantile(p, 0.5, 0.5) == pytest.approx(math.sin(math.pi * p / 2) ** 2, rel=1e-13)
        assert cumulative_beta(beta_quantile(p, 0.6, 0.6), 0.6, 0.6) == pytest.approx(p, rel=1e-13)


def test_karras_and_exponential_by_their_formulas():
    karras = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    np.testing.assert_allclose(spaced_sigmas("karras", 10, 80.0, 0.002).numpy(), karras, rtol=1e-12)
    exponential = [80 * (0.002 / 80) ** (i / 9) for i in range(10)]
    np.testing.assert_allclose(spaced_sigmas("exponential", 10, 80.0, 0.002).numpy(), exponential, rtol=1e-12)
    beta = spaced_sigmas("beta", 11, 80.0, 0.002)
    assert beta[[0, 5, 10]].tolist() == pytest.approx([80.0, 40.001, 0.002])


@pytest.mark.parametrize("steps", [2, 3, 20, 64])
def test_linear_quadratic_is_mochi_s(steps):
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    for threshold, linear in ((0.025, None), (0.1, 1)):
        ours = linear_quadratic_sigmas(steps, threshold_noise=threshold, linear_steps=linear)
        np.testing.assert_allclose(ours.numpy(), linear_quadratic_schedule(steps, threshold, linear), rtol=1e-12)


def test_sigmas_and_timesteps_are_each_other_s_inverse_at_training_timesteps():
    table = NoiseSchedule.scaled_linear().sigmas
    t = torch.tensor([999.0, 500.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(sigmas_at(table, t), table[t.long()])
    torch.testing.assert_close(timesteps_at(table, table[t.long()]), t, rtol=1e-12, atol=1e-9)
    assert sigmas_at(table, torch.tensor([-5.0, 2000.0]).double()).tolist() == [table[0].item(), table[-1].item()]
    middle = sigmas_at(table, torch.tensor([10.25], dtype=torch.float64)).item()
    assert middle == pytest.approx(0.75 * table[10].item() + 0.25 * table[11].item())


FLOWS = {
    "plain": ({}, {"num_inference_steps": 28}),
    "shift": ({"shift": 3.0}, {"num_inference_steps": 28}),
    "one step": ({"shift": 3.0}, {"num_inference_steps": 1}),
    "sigmas": ({"shift": 7.0}, {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
    "exponential mu": ({"use_dynamic_shifting": True}, {"num_inference_steps": 20, "mu": 1.15}),
    "linear mu": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"sigmas": [1.0, 0.5, 0.25], "mu": 2.0}),
    "terminal": ({"shift": 2.0, "shift_terminal": 0.1}, {"num_inference_steps": 20}),
    "karras": ({"shift": 3.0, "use_karras_sigmas": True}, {"num_inference_steps": 20}),
    "exponential": ({"use_exponential_sigmas": True}, {"num_inference_steps": 20}),
    "beta": ({"shift": 3.0, "use_beta_sigmas": True}, {"num_inference_steps": 20}),
    "inverted": ({"invert_sigmas": True}, {"num_inference_steps": 20}),
    "timesteps": ({"shift": 3.0}, {"timesteps": [900.0, 500.0, 100.0]}),
    "sigmas and timesteps": ({"shift": 3.0}, {"timesteps": [900.0, 500.0], "sigmas": [0.8, 0.3]}),
    "trained with 500": ({"num_train_timesteps": 500}, {"num_inference_steps": 20}),
}


def flow_schedule(config):
    """Our schedule of diffusers' configuration."""
    config = {**config}
    for spacing in ("karras", "exponential", "beta"):
        if config.pop(f"use_{spacing}_sigmas", False):
            config["sigma_spacing"] = spacing
    return FlowSchedule(**config)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_schedules_are_diffusers(name):
    config, arguments = FLOWS[name]
    ours = flow_schedule(config).steps(**arguments)
    with in_float64(diffusers.FlowMatchEulerDiscreteScheduler):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        theirs.set_timesteps(**arguments)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spaced_sigmas("kerras", 5, 2.0, 1.0), ValueError, "sigma_spacing: expected one of .* got 'kerras'"),
        (lambda: spaced_sigmas("karras", 0, 2.0, 1.0), ValueError, "num_inference_steps: expected a positive"),
        (lambda: spaced_sigmas("karras", 5, 1.0, 2.0), ValueError, "sigma_min: expected a number from 0 on and below"),
        (lambda: spaced_sigmas("exponential", 5, 1.0, 0.0), ValueError, "sigma_min: expected a number above 0"),
        (lambda: linear_quadratic_sigmas(1), ValueError, "num_inference_steps: expected an integer from 2 on"),
        (lambda: linear_quadratic_sigmas(4, linear_steps=4), ValueError, "linear_steps: expected fewer than"),
        (lambda: linear_quadratic_sigmas(4, threshold_noise=1.0), ValueError, "threshold_noise: expected a number"),
        (lambda: FlowSchedule(shift=0.0), ValueError, "shift: expected a positive number, got 0"),
        (lambda: FlowSchedule(num_train_timesteps=0), ValueError, "num_train_timesteps: expected a positive"),
        (lambda: FlowSchedule(time_shift_type="cubic"), ValueError, "time_shift_type: expected one of"),
        (lambda: FlowSchedule(shift_terminal=1.0), ValueError, "shift_terminal: expected a number above 0"),
        (lambda: FlowSchedule(sigma_spacing="lu"), ValueError, "sigma_spacing: expected None or one of .* got 'lu'"),
        (lambda: FlowSchedule().steps(), ValueError, "num_inference_steps: expected a number, or sigmas=, got None"),
        (lambda: FlowSchedule().steps(2, sigmas=[0.5]), ValueError, "num_inference_steps: expected 1, the number of"),
        (lambda: FlowSchedule().steps(sigmas=[0.5, 0.5]), ValueError, "sigmas: expected strictly falling values, got"),
        (lambda: FlowSchedule().steps(sigmas=[0.5, 0.0]), ValueError, "sigmas: expected finite positive values, got"),
        (lambda: FlowSchedule().steps(sigmas=[1.5, 0.5]), ValueError, "sigmas: expected strictly falling values above"),
        (lambda: FlowSchedule().steps(sigmas=["a"]), TypeError, "sigmas: expected a tensor or a sequence of numbers"),
        (lambda: FlowSchedule().steps(sigmas=[True]), TypeError, "sigmas: expected real numbers, got torch.bool"),
        (lambda: FlowSchedule().steps(sigmas=[[0.5]]), ValueError, "sigmas: expected one dimension and at least 1"),
        (lambda: FlowSchedule().steps(4, mu=1.0), ValueError, "mu: expected None, as use_dynamic_shifting is False"),
        (lambda: FlowSchedule(use_dynamic_shifting=True).steps(4), ValueError, "mu: expected a number, as .* got None"),
        (lambda: NoiseSchedule.linear().shift_snr(0), ValueError, "scale: expected a positive number, got 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
