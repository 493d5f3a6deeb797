"""The orders of convergence of solvers that go on from earlier calls, on an ODE whose solution is known.

Data: six Gaussians, one a dimension. What a perfect model predicts is linear in the sample, and along the
probability-flow ODE the sample keeps its distance from the mean in standard deviations. Multistep solvers begin with
lower orders: where that would show, the first steps are as small as the square of the others.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import FlowSchedule, NoiseSchedule
from tests.support.convergence import slope

VARIANCES = torch.tensor([[0.1, 0.2, 0.4, 0.7, 1.7, 3.0]], dtype=torch.float64)
MEAN, DISTANCE = 0.7, 1.3
VP = NoiseSchedule.from_alphas_cumprod(torch.linspace(0, 1.5, 20_000, dtype=torch.float64).cos().square() * 0.999)
FLOW = FlowSchedule()


def exact(alpha, sigma):
    """The sample at a level, and what a model of the velocity and of epsilon says of it."""
    return alpha * MEAN + (alpha**2 * VARIANCES + sigma**2).sqrt() * DISTANCE


def predicted(x, alpha, sigma):
    epsilon = sigma * (x - alpha * MEAN) / (alpha**2 * VARIANCES + sigma**2)
    return epsilon, (x - sigma * epsilon) / alpha


def error(table, end, velocity):
    """The distance from the exact sample at the level ``end`` after all calls."""
    levels = list(zip(*(values.tolist() for values in table.levels), strict=True))
    x = exact(*levels[0])
    history = fastguide.History(table, x) if table.history_slots else None
    for call, (alpha, sigma) in enumerate(levels):
        epsilon, original = predicted(x, alpha, sigma)
        prediction = epsilon - original if velocity else epsilon
        x = fastguide.guided_step(table, call, x, prediction, history=history)
    return (x - exact(*end)).norm().item()


def falling(steps, first=0.95, last=0.05):
    """Sigmas, of which the first three steps are as small as the square of the others."""
    even = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    small = (first - last) / steps**2
    return torch.cat([first - small * torch.arange(3, dtype=torch.float64), even[1:]])


def over_flow(make, steps):
    """Order of a solver along a flow, to the last of its sigmas, which DEIS and others repeat."""

    def of(count):
        table = make(sigmas=falling(count))
        return error(table, (0.95, 0.05), velocity=True)

    return slope(of, steps)


STEPS = (40, 80, 160, 320)
MORE = (160, 320, 640, 1280)  # where the order shows later
END = {"final_sigmas_type": "sigma_min", "lower_order_final": False}


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("solver_order", "order"), [(1, 1), (2, 2), (3, 2)])
def test_dpm_solver(solver_order, order, algorithm_type, solver_type):
    """The third converges with the second order: it halves the second difference, as its authors' code does."""

    def make(**sigmas):
        return fastguide.dpm_solver(
            FLOW, solver_order=solver_order, algorithm_type=algorithm_type, solver_type=solver_type, **END, **sigmas
        )

    assert over_flow(make, MORE if solver_order == 3 else STEPS) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_dpm_solver_singlestep(solver_order, algorithm_type, solver_type):
    def of(rounds):
        table = fastguide.dpm_solver_singlestep(
            VP, rounds * solver_order, solver_order=solver_order, algorithm_type=algorithm_type,
            solver_type=solver_type, sigma_spacing="exponential", **END,
        )  # fmt: skip
        return error(table, vp_end(), velocity=False)

    assert slope(of, STEPS) == pytest.approx(solver_order, abs=0.2)


def vp_end():
    abar = VP.alphas_cumprod[0].item()
    return math.sqrt(abar), math.sqrt(1 - abar)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_unipc_s_corrector_gives_one_order_more(solver_order, predict_x0, solver_type):
    def make(**sigmas):
        return fastguide.unipc(
            FLOW, solver_order=solver_order, predict_x0=predict_x0, solver_type=solver_type, **END, **sigmas
        )

    assert over_flow(make, STEPS) == pytest.approx(solver_order + 1, abs=0.2)


@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_unipc_without_its_corrector(solver_order):
    def make(**sigmas):
        return fastguide.unipc(FLOW, solver_order=solver_order, disable_corrector=range(1000), **END, **sigmas)

    assert over_flow(make, STEPS) == pytest.approx(solver_order, abs=0.2)


@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_deis(solver_order):
    def make(**sigmas):
        return fastguide.deis(FLOW, solver_order=solver_order, lower_order_final=False, **sigmas)

    assert over_flow(make, MORE) == pytest.approx(solver_order, abs=0.2)


@pytest.mark.parametrize(
    ("predictor_order", "corrector_order", "algorithm_type"),
    [
        (1, 1, "data_prediction"), (1, 2, "data_prediction"), (2, 2, "data_prediction"), (2, 3, "data_prediction"),
        (3, 4, "data_prediction"), (1, 1, "noise_prediction"), (1, 2, "noise_prediction"), (2, 2, "noise_prediction"),
        (2, 3, "noise_prediction"),
    ],
)  # fmt: skip
def test_sa_solver_without_noise(predictor_order, corrector_order, algorithm_type):
    def make(**sigmas):
        return fastguide.sa_solver(
            FLOW, predictor_order=predictor_order, corrector_order=corrector_order, algorithm_type=algorithm_type,
            tau_func=lambda timestep: 0.0, lower_order_final=False, **sigmas,
        )  # fmt: skip

    assert over_flow(make, MORE) == pytest.approx(corrector_order, abs=0.2)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order):
    def of(steps):
        even = cubes(steps)
        small = (even[0] - even[1]) / steps
        sigmas = torch.cat([even[0] - small * torch.arange(3, dtype=torch.float64), even[1:]])
        return error(fastguide.lms(VP, sigmas=sigmas, order=order), (1.0, 0.0), velocity=False)

    assert slope(of, (50, 100, 200, 400)) == pytest.approx(order, abs=0.2)


def cubes(steps):
    """Sigmas from 5 to 0 whose cube roots are evenly spaced."""
    return torch.linspace(5 ** (1 / 3), 0, steps + 1, dtype=torch.float64) ** 3


@pytest.mark.parametrize("solver", [fastguide.heun, fastguide.dpm2])
def test_two_calls_a_step(solver):
    def of(steps):
        return error(solver(VP, sigmas=cubes(steps)), (1.0, 0.0), velocity=False)

    assert slope(of, (100, 200, 400, 800)) == pytest.approx(2, abs=0.2)


def test_flow_match_heun():
    def of(steps):
        sigmas = torch.linspace(0.95, 0, steps + 1, dtype=torch.float64)[:-1]
        return error(fastguide.flow_match_heun(FLOW, sigmas=sigmas), (1.0, 0.0), velocity=True)

    assert slope(of, STEPS) == pytest.approx(2, abs=0.2)


def test_pndm():
    """Of the second order in all (Liu et al. 2022), though it combines four predictions."""

    def of(steps):
        timesteps = torch.linspace(19_200, 0, steps + 1).long()[:-1]
        return error(fastguide.pndm(VP, timesteps=timesteps), vp_end(), velocity=False)

    assert slope(of, (50, 100, 200, 400)) == pytest.approx(2, abs=0.2)
