"""Error against model calls of every deterministic solver, on a guided problem whose model is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..guidance import ClassifierFree
from ..schedules import FlowSchedule, NoiseSchedule
from ..schedules.sigmas import spaced_sigmas
from ..solvers import (
    StepTable,
    ddim,
    deis,
    dpm2,
    dpm_solver,
    dpm_solver_singlestep,
    euler,
    flow_match_euler,
    flow_match_heun,
    heun,
    lms,
    pndm,
    sa_solver,
    unipc,
)
from ..step.guided_step import guided_step
from ..step.history import History
from .mixture import noise_prediction

GUIDANCE_SCALE, LABEL = 2.0, 1
CALLS = (6, 9, 13, 19, 28, 40, 60, 90, 130)
_SCHEDULE, _FLOW = NoiseSchedule.scaled_linear(), FlowSchedule()
_MOST, _LEAST = _SCHEDULE.sigmas[-1].item(), _SCHEDULE.sigmas[0].item()


class Line(NamedTuple):
    """The errors of a solver."""

    name: str
    points: list[tuple[int, float]]
    """Model calls, and the relative error after them."""
    slope: float
    """The fitted order, over the last five points."""


def lines() -> list[Line]:
    """Return the line of each solver, all from the same noise and between the same levels.

    Steps lie at Karras' sigmas, and those of DDIM and PNDM at even timesteps. The error is that at the level of
    timestep 0, relative to the sample's size; the solution is UniPC's of the third order with 2000 calls.
    """
    x_T = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = _end(_MAKERS["UniPC 3"](2001), x_T)
    found = []
    for name, make in _MAKERS.items():
        points = []
        for calls in CALLS:
            table = make(_levels_for(name, calls))
            error = (_end(table, x_T) - solution).norm() / solution.norm()
            points.append((len(table) - 1, error.item()))
        found.append(Line(name, points, _slope(points[-5:])))
    return found


def _levels_for(name: str, calls: int) -> int:
    """Return the number of levels that a solver visits with about so many calls."""
    return (calls // 2 if name in _TWO_CALLS else calls) + 1


def _end(table: StepTable, x_T: Tensor) -> Tensor:
    """Return the sample at the level of the last call, with alpha 1, by all calls before that one."""
    assert table.levels is not None
    levels = list(zip(table.levels.alpha.tolist(), table.levels.sigma.tolist(), strict=True))
    x = math.hypot(*levels[0]) * x_T
    history, guidance = History(table, x), ClassifierFree(GUIDANCE_SCALE)
    for call, (alpha, sigma) in enumerate(levels[:-1]):
        predictions = [_prediction(table, x, alpha, sigma, label) for label in (None, LABEL)]
        x = guided_step(table, call, x, predictions, guidance, history=history)
    end: Tensor = x / levels[-1][0]
    return end


def _prediction(table: StepTable, x: Tensor, alpha: float, sigma: float, label: int | None) -> Tensor:
    epsilon = noise_prediction(x, alpha, sigma, label)
    return epsilon - (x - sigma * epsilon) / alpha if table.name.startswith("flow") else epsilon


def _slope(points: list[tuple[int, float]]) -> float:
    """Return the slope in logarithms, by least squares, as a positive number."""
    xy = torch.tensor(points, dtype=torch.float64).log()
    x, y = (xy - xy.mean(0)).unbind(1)
    return -float((x * y).sum() / x.square().sum())


def _even(levels: int) -> Tensor:
    return torch.linspace(len(_SCHEDULE) - 1, 0, levels).round().long()


def _of_flow(levels: int) -> Tensor:
    """Return a flow's sigmas at the levels of Karras' sigmas."""
    sigmas = spaced_sigmas("karras", levels, _MOST, _LEAST)
    return sigmas / (1 + sigmas)


_TWO_CALLS = ("Heun", "Heun, flow", "DPM2")
_MAKERS: dict[str, Callable[[int], StepTable]] = {
    "DDIM": lambda n: ddim(_SCHEDULE, timesteps=_even(n)),
    "Euler": lambda n: euler(_SCHEDULE, n, sigma_spacing="karras"),
    "Euler, flow": lambda n: flow_match_euler(_FLOW, sigmas=_of_flow(n)),
    "Heun": lambda n: heun(_SCHEDULE, n, sigma_spacing="karras"),
    "Heun, flow": lambda n: flow_match_heun(_FLOW, sigmas=_of_flow(n)),
    "DPM2": lambda n: dpm2(_SCHEDULE, n, sigma_spacing="karras"),
    "LMS 4": lambda n: lms(_SCHEDULE, n, sigma_spacing="karras"),
    "PNDM": lambda n: pndm(_SCHEDULE, timesteps=_even(n)),
    "DPM++ 2M": lambda n: dpm_solver(_SCHEDULE, n, sigma_spacing="karras", lower_order_final=False),
    "DPM++ 3M": lambda n: dpm_solver(_SCHEDULE, n, solver_order=3, sigma_spacing="karras", lower_order_final=False),
    "DPM++ 2S": lambda n: dpm_solver_singlestep(_SCHEDULE, n, sigma_spacing="karras"),
    "DPM++ 3S": lambda n: dpm_solver_singlestep(_SCHEDULE, n, solver_order=3, sigma_spacing="karras"),
    "DEIS 3": lambda n: deis(_SCHEDULE, n, solver_order=3, sigma_spacing="karras", lower_order_final=False),
    "UniPC 2": lambda n: unipc(_SCHEDULE, n, sigma_spacing="karras"),
    "UniPC 3": lambda n: unipc(_SCHEDULE, n, solver_order=3, sigma_spacing="karras"),
    "SA-Solver, tau 0": lambda n: sa_solver(
        _SCHEDULE, n, tau_func=lambda timestep: 0.0, sigma_spacing="karras", lower_order_final=False
    ),
}
