"""SA-Solver, stochastic Adams methods: Xue et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from ..schedules.flow import FlowSchedule
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import Linear, PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._dpm import lambda_of, levels_of
from ._options import check_choice, check_flags, check_order
from ._quadrature import lagrange_integrals
from ._signal_steps import SignalSteps, prediction_of, signal_steps, signal_table
from .begin import begins_anywhere
from .entries import Entry, Form, history_columns
from .table import StepTable

SAAlgorithm: TypeAlias = Literal["data_prediction", "noise_prediction"]


@begins_anywhere
def sa_solver(
    schedule: NoiseSchedule | FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    algorithm_type: SAAlgorithm = "data_prediction",
    tau_func: Callable[[int], float] | None = None,
    prediction_type: PredictionType | None = None,
    lower_order_final: bool = True,
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    sigma_spacing: SigmaSpacing | None = None,
    lambda_min_clipped: float = -math.inf,
    timesteps: Tensor | Sequence[int] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
    begin: int = 0,
) -> StepTable:
    """Return SA-Solver's steps: each call corrects the last step, and predicts the next, with noise.

    The variance-controlled SDE, whose noise is tau times that of the reverse SDE, is integrated by Adams' methods over
    lambda (Xue et al. 2023, algorithm 1): predictors after Bashforth, correctors after Moulton.

    Args:
        schedule: the noise schedule or the flow that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        predictor_order: how many calls it goes on from, 1 to 3.
        corrector_order: how many predictions, the new one among them, 1 to 4.
        algorithm_type: the predictions are x_0, ``"data_prediction"``, or epsilon, ``"noise_prediction"``.
        tau_func: tau of each timestep; ``None``: 1 from timestep 200 to 800, else 0, without noise.
        lower_order_final: the last steps are of lower order.
        prediction_type, timestep_spacing, steps_offset, sigma_spacing, lambda_min_clipped, timesteps, sigmas, mu: as in
            ``dpm_solver``. The last step leads to the level of timestep 0, and of a flow to its last level again.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, whose calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> table = sa_solver(NoiseSchedule.scaled_linear(), 20)
    >>> table, table.history_slots
    (StepTable(sa_solver, 20 steps, timesteps 999 .. 50, device=cpu), 2)
    """
    for name, order, most in (("predictor_order", predictor_order, 3), ("corrector_order", corrector_order, 4)):
        check_order(name, order, most)
    check_flags(lower_order_final=lower_order_final)
    check_choice("algorithm_type", algorithm_type, SAAlgorithm)
    steps = signal_steps(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        sigma_spacing=sigma_spacing,
        final_sigmas_type="sigma_min",
        timesteps=timesteps,
        sigmas=sigmas,
        mu=mu,
        begin=begin,
        lambda_min_clipped=lambda_min_clipped,
    )
    return sa_solver_table(
        steps,
        prediction_of(schedule, prediction_type, steps.here),
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        predict_x0=algorithm_type == "data_prediction",
        taus=_taus(steps, tau_func),
        lower_order_final=lower_order_final,
    )


def sa_solver_table(
    steps: SignalSteps,
    x0: Linear,
    *,
    predictor_order: int,
    corrector_order: int,
    predict_x0: bool,
    taus: Sequence[float],
    lower_order_final: bool,
) -> StepTable:
    """Return ``sa_solver`` over any levels and timesteps; ``taus``: of each call."""
    columns = x0.columns()
    forms = _forms(steps, predictor_order, corrector_order, predict_x0, taus, lower_order_final)
    columns |= history_columns(forms, Entry.original(steps.here) if predict_x0 else Entry.epsilon(steps.here))
    return signal_table(steps, columns, "sa_solver")


def _taus(steps: SignalSteps, tau_func: Callable[[int], float] | None) -> list[float]:
    """Return tau of each call."""
    told = steps.timesteps.tolist()
    if tau_func is None:
        return [1.0 if 200 <= timestep <= 800 else 0.0 for timestep in told]
    if not callable(tau_func):
        raise TypeError(f"tau_func: expected a callable or None, got {tau_func!r}")
    taus = [float(tau_func(timestep)) for timestep in told]
    if not all(0 <= tau < math.inf for tau in taus):
        raise ValueError(f"tau_func: expected values from 0 on, got {taus}")
    return taus


class _Interval(NamedTuple):
    """A step between two levels, with a tau: ``sample * x + factor * sum_j w_j * entry_j + noise * z``."""

    start: float
    end: float
    """Lambda where it begins and ends."""
    growth: float
    """Of the exponential under the integrals, e^(growth * (lambda - end))."""
    sample: float
    factor: float
    noise: float

    @classmethod
    def of(cls, start: tuple[float, float], end: tuple[float, float], tau: float, predict_x0: bool) -> _Interval:
        """Return the interval (Xue et al. 2023, the exact solution over x_0, or over the noise)."""
        (alpha_s, sigma_s), (alpha, sigma) = start, end
        low, high = lambda_of(start), lambda_of(end)
        h, rate = high - low, 1 + tau**2
        if predict_x0:
            noise = sigma * math.sqrt(max(-math.expm1(-2 * tau**2 * h), 0.0))
            return cls(low, high, rate, sigma / sigma_s * math.exp(-(tau**2) * h), rate * alpha, noise)
        noise = tau * sigma * math.sqrt(max(math.expm1(2 * h), 0.0))
        return cls(low, high, -1.0, alpha / alpha_s, -rate * sigma, noise)

    def weights(self, nodes: Sequence[float], predict_x0: bool) -> list[float]:
        """Return the weights of the entries at these lambdas.

        Two x_0 are combined as the authors' code does, in which h^2 / 2 stands for an integral under the exponential.
        """
        h = self.end - self.start
        if h == 0:
            return [0.0] * len(nodes)
        weights = lagrange_integrals([node - self.end for node in nodes], -h, 0.0, self.growth)
        if predict_x0 and len(nodes) == 2:
            c = self.growth
            change = h**2 / 2 - (h * c + math.expm1(-c * h)) / c**2
            slope = change / (nodes[0] - nodes[1])
            weights = [weights[0] + slope, weights[1] - slope]
        return weights


def _forms(
    steps: SignalSteps,
    predictor_order: int,
    corrector_order: int,
    predict_x0: bool,
    taus: Sequence[float],
    lower_order_final: bool,
) -> list[Form]:
    points, forms = levels_of(steps.levels), []
    lambdas, calls = [lambda_of(point) for point in points], len(points) - 1
    predicted: dict[int, float] = {}
    last: _Interval | None = None
    for call in range(calls):
        over = _Interval.of(points[call], points[call + 1], taus[call], predict_x0)
        form = Form(sample=over.sample, noise=over.noise)
        if last is not None:  # its noise is the corrected sample's too, and drops out
            order = min(corrector_order, call + 1, calls - call + 2 if lower_order_final else corrector_order)
            used = range(call, call - order, -1)
            weights = last.weights([lambdas[earlier] for earlier in used], predict_x0)
            form = Form(anchor=over.sample, noise=over.noise)
            form.add(dict(zip(used, weights, strict=True)), over.sample * last.factor)
            form.add(predicted, -over.sample)
        order = min(predictor_order, call + 1, calls - call if lower_order_final else predictor_order)
        used = range(call, call - order, -1)
        weights = over.weights([lambdas[earlier] for earlier in used], predict_x0)
        predicted = {earlier: over.factor * weight for earlier, weight in zip(used, weights, strict=True)}
        forms.append(form.add(predicted))
        last = over
    return forms
