"""One interval of DPM-Solver, in all its forms: Lu et al. 2022, and "DPM-Solver++", 2022."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.predictions import Linear
from ._options import check_choice, check_order
from .entries import Entry, Form, history_columns

AlgorithmType: TypeAlias = Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"]
SolverType: TypeAlias = Literal["midpoint", "heun"]


class Interval(NamedTuple):
    """The exact part of a step over an entry and its differences: ``sample * x + first * e + second * e' + ...``.

    The integrals of the entry's Taylor expansion in lambda (Lu et al. 2022, "DPM-Solver++", proposition 4.1), whose
    derivatives a step estimates by differences.
    """

    h: float
    """By how much lambda = log(alpha / sigma) rises."""
    sample: float
    first: float
    second: float
    third: float
    noise: float
    """The standard deviation of what is added."""

    @property
    def is_empty(self) -> bool:
        """Whether the step stays where it is, as the last one does where the last sigma is repeated."""
        return self.h == 0


def interval(algorithm_type: AlgorithmType, start: tuple[float, float], end: tuple[float, float]) -> Interval:
    """Return the interval between two levels (alpha, sigma), of which the second may be clean."""
    h = lambda_of(end) - lambda_of(start)
    if h == 0:
        return Interval(h, 1.0, 0.0, 0.0, 0.0, 0.0)
    (alpha_s, sigma_s), (alpha, sigma) = start, end
    if algorithm_type in ("dpmsolver++", "sde-dpmsolver++"):  # over x_0: with noise, twice as fast
        speed = 2 * h if algorithm_type == "sde-dpmsolver++" else h
        mean = alpha * -math.expm1(-speed)
        second = alpha * (math.expm1(-speed) / speed + 1)
        third = -alpha * ((math.expm1(-speed) / speed + 1) / speed - 0.5)
        if algorithm_type == "dpmsolver++":
            return Interval(h, sigma / sigma_s, mean, second, third, 0.0)
        third -= alpha  # no part of the integral, which vanishes with h; but what diffusers steps with
        noise = sigma * math.sqrt(max(-math.expm1(-speed), 0.0))
        return Interval(h, sigma / sigma_s * math.exp(-h), mean, second, third, noise)
    twice = 2 if algorithm_type == "sde-dpmsolver" else 1
    mean = -twice * sigma * math.expm1(h)
    second = -twice * sigma * (math.expm1(h) / h - 1)
    third = -sigma * ((math.expm1(h) / h - 1) / h - 0.5)
    noise = sigma * math.sqrt(max(math.expm1(2 * h), 0.0)) if twice == 2 else 0.0
    return Interval(h, alpha / alpha_s, mean, second, third, noise)


def lambda_of(level: tuple[float, float]) -> float:
    """Return log(alpha / sigma): half the logarithm of the signal-to-noise ratio; infinite without noise or signal."""
    alpha, sigma = level
    if sigma == 0 or alpha == 0:
        return math.inf if sigma == 0 else -math.inf
    return math.log(alpha / sigma)


def second_order(over: Interval, r: float, solver_type: SolverType) -> float:
    """Return the factor of ``e - e_1``, e_1 being ``r * h`` before; the two types agree to the second order."""
    return (over.first / 2 if solver_type == "midpoint" else over.second) / r


def levels_of(levels: Levels) -> list[tuple[float, float]]:
    """Return the levels as pairs of numbers."""
    return list(zip(levels.alpha.tolist(), levels.sigma.tolist(), strict=True))


def entry_of(algorithm_type: AlgorithmType, levels: Levels) -> Entry:
    """Return what the calls leave: x_0, or the noise."""
    return Entry.original(levels) if algorithm_type.endswith("++") else Entry.epsilon(levels)


def multistep_columns(
    levels: Levels,
    x0: Linear,
    *,
    solver_order: int,
    algorithm_type: AlgorithmType,
    solver_type: SolverType,
    lower_order_final: bool,
    euler_at_final: bool,
    total: int,
) -> dict[str, Tensor]:
    """Return the columns of the multistep solver.

    Args:
        levels: where each step begins, and where the last one ends: (calls + 1,).
        x0: the conversion of the prediction.
        total: the number of steps, with those before the first call.
        the others: as in ``dpm_solver``.
    """
    points = levels_of(levels)
    calls, short = len(points) - 1, lower_order_final and total < 15
    forms = []
    for call in range(calls):
        over = interval(algorithm_type, points[call], points[call + 1])
        last, last_but_one = call == calls - 1, call == calls - 2
        order = min(solver_order, call + 1, 2 if last_but_one and short else 3)
        if over.is_empty or (last and (euler_at_final or short or points[-1][1] == 0)):
            order = 1
        back = [lambda_of(point) for point in points[max(call - 2, 0) : call + 1]][::-1]
        form = Form(sample=over.sample, noise=over.noise).add({call: over.first})
        if order == 2:
            w = second_order(over, (back[0] - back[1]) / over.h, solver_type)
            form.add({call: w, call - 1: -w})
        elif order == 3:
            form.add(_third_order(call, over, back))
        forms.append(form)
    here = levels.at(slice(None, -1))
    columns = x0.columns()
    return columns | history_columns(forms, entry_of(algorithm_type, here))


def _third_order(call: int, over: Interval, back: list[float]) -> dict[int, float]:
    """Return what the third order adds to the first (diffusers, after Lu's code; the papers have it as singlestep)."""
    r0, r1 = (back[0] - back[1]) / over.h, (back[1] - back[2]) / over.h
    both = (over.second * r0 + over.third) / (r0 + r1)
    newer, older = (over.second + both) / r0, both / r1
    return {call: newer, call - 1: -newer - older, call - 2: older}


def check_choices(solver_order: int, algorithm_type: str, solver_type: str, highest: int = 3) -> None:
    """Refuse an order, an algorithm or a solver type that DPM-Solver has not."""
    check_choice("algorithm_type", algorithm_type, AlgorithmType)
    check_choice("solver_type", solver_type, SolverType)
    check_order("solver_order", solver_order, highest, f" with {algorithm_type!r}")
