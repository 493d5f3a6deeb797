"""DEIS, the exponential integrator with polynomials in log(rho): Zhang & Chen 2023."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..schedules.flow import FlowSchedule
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import Linear, PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._dpm import lambda_of, levels_of
from ._options import check_flags, check_order
from ._quadrature import lagrange_integrals
from ._signal_steps import SignalSteps, prediction_of, signal_steps, signal_table
from .begin import begins_anywhere
from .entries import Entry, Form, history_columns
from .table import StepTable


@begins_anywhere
def deis(
    schedule: NoiseSchedule | FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    solver_order: int = 2,
    prediction_type: PredictionType | None = None,
    lower_order_final: bool = True,
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    sigma_spacing: SigmaSpacing | None = None,
    timesteps: Tensor | Sequence[int] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
    begin: int = 0,
) -> StepTable:
    """Return DEIS' steps, tAB-DEIS in log(rho): the noise is extrapolated by a polynomial through the last calls'.

    ``x' = alpha' / alpha * x - sigma' * sum_j epsilon_j * integral of e^-u * l_j(u)`` over u = lambda - lambda', from
    -h to 0 (Zhang & Chen 2023, section 3; log(rho) is -lambda).

    Args:
        schedule: the noise schedule or the flow that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        solver_order: 1, 2 or 3.
        prediction_type, timestep_spacing, steps_offset, sigma_spacing, timesteps, sigmas, mu: as in ``dpm_solver``.
            The last step leads to the level of timestep 0, and of a flow to its last level again.
        lower_order_final: with fewer than 15 steps, the last two are of lower order.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, whose calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> table = deis(NoiseSchedule.scaled_linear(), 20, solver_order=3)
    >>> table, table.history_slots
    (StepTable(deis, 20 steps, timesteps 999 .. 50, device=cpu), 2)
    """
    check_order("solver_order", solver_order, 3)
    check_flags(lower_order_final=lower_order_final)
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
    )
    x0 = prediction_of(schedule, prediction_type, steps.here)
    return deis_table(steps, x0, solver_order, lower_order_final)


def deis_table(steps: SignalSteps, x0: Linear, solver_order: int, lower_order_final: bool) -> StepTable:
    """Return ``deis`` over any levels and timesteps."""
    columns = x0.columns()
    short = lower_order_final and steps.total < 15
    columns |= history_columns(_forms(levels_of(steps.levels), solver_order, short), Entry.epsilon(steps.here))
    return signal_table(steps, columns, "deis")


def _forms(points: Sequence[tuple[float, float]], solver_order: int, short: bool) -> list[Form]:
    forms, calls = [], len(points) - 1
    lambdas = [lambda_of(point) for point in points]
    for call in range(calls):
        order = min(solver_order, call + 1, calls - call if short else solver_order)
        (alpha_s, _), (alpha, sigma) = points[call], points[call + 1]
        end = lambdas[call + 1]
        used = range(call, call - order, -1)
        nodes = [lambdas[earlier] - end for earlier in used]
        weights = lagrange_integrals(nodes, lambdas[call] - end, 0.0, growth=-1.0)
        forms.append(Form(sample=alpha / alpha_s).add(dict(zip(used, weights, strict=True)), -sigma))
    return forms
