"""DPM-Solver, singlestep: Lu et al. 2022, algorithms 1 and 2, and "DPM-Solver++", 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from ..schedules.flow import FlowSchedule
from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule
from ..schedules.predictions import Linear, PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._dpm import (
    AlgorithmType,
    Interval,
    SolverType,
    check_choices,
    entry_of,
    interval,
    lambda_of,
    levels_of,
    second_order,
)
from ._options import check_choice, check_flags
from ._signal_steps import SignalSteps, prediction_of, signal_steps, signal_table
from ._unscaled import FinalSigmasType
from .begin import begins_anywhere
from .entries import Entry, Form, history_columns
from .table import StepTable

SinglestepAlgorithm: TypeAlias = Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++"]


@begins_anywhere
def dpm_solver_singlestep(
    schedule: NoiseSchedule | FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    solver_order: int = 2,
    algorithm_type: SinglestepAlgorithm = "dpmsolver++",
    solver_type: SolverType = "midpoint",
    prediction_type: PredictionType | None = None,
    lower_order_final: bool = True,
    final_sigmas_type: FinalSigmasType = "zero",
    sigma_spacing: SigmaSpacing | None = None,
    lambda_min_clipped: float = -math.inf,
    timesteps: Tensor | Sequence[int] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
    begin: int = 0,
) -> StepTable:
    """Return singlestep DPM-Solver's steps, by default DPM-Solver++(2S).

    A step of order 2 or 3 makes as many model calls, each from where the step began: the second and the third go back
    there, and take in what the earlier calls predicted. A call counts as a step here, as in diffusers: the order of its
    calls is 1, 2, 1, 2, ..., or 1, 2, 3, 1, 2, 3, ...

    Args:
        schedule: the noise schedule or the flow that the model was trained with.
        num_inference_steps: number of model calls, if ``timesteps`` or ``sigmas`` do not say them.
        solver_order: 1, 2 or 3; ``"sde-dpmsolver++"`` has no 3 here, which would need two entries of one call.
        algorithm_type: ``"dpmsolver++"`` is over x_0, ``"dpmsolver"`` over the noise; ``"sde-dpmsolver++"`` adds noise.
        solver_type: ``"midpoint"`` or ``"heun"``.
        prediction_type: what the model returns; ``None``: ``"epsilon"``, and of a flow ``"flow_prediction"``.
        lower_order_final: the last calls are of lower order where the number is no multiple of the order, and the last
            one always; ``False``: expects a multiple, and no step to sigma 0.
        final_sigmas_type, sigma_spacing, lambda_min_clipped, timesteps, sigmas, mu: as in ``dpm_solver``.
        begin: the first model call; those before it are left out, as image-to-image does.

    Returns:
        The step table, whose calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> dpm_solver_singlestep(NoiseSchedule.scaled_linear(), 20)
    StepTable(dpm_solver_singlestep, 20 steps, timesteps 999 .. 50, device=cpu)
    """
    check_flags(lower_order_final=lower_order_final)
    check_choice("algorithm_type", algorithm_type, SinglestepAlgorithm)
    check_choices(solver_order, algorithm_type, solver_type, 2 if algorithm_type == "sde-dpmsolver++" else 3)
    if final_sigmas_type == "zero" and algorithm_type == "dpmsolver":
        raise ValueError("final_sigmas_type: expected 'sigma_min' with 'dpmsolver', got 'zero'")
    steps = signal_steps(
        schedule,
        num_inference_steps,
        timestep_spacing="linspace",
        steps_offset=0,
        sigma_spacing=sigma_spacing,
        final_sigmas_type=final_sigmas_type,
        timesteps=timesteps,
        sigmas=sigmas,
        mu=mu,
        begin=begin,
        lambda_min_clipped=lambda_min_clipped,
    )
    x0 = prediction_of(schedule, prediction_type, steps.here)
    orders = _orders(steps, solver_order, lower_order_final)
    return singlestep_table(steps, x0, orders, algorithm_type, solver_type)


def singlestep_table(
    steps: SignalSteps, x0: Linear, orders: Sequence[int], algorithm_type: AlgorithmType, solver_type: SolverType
) -> StepTable:
    """Return ``dpm_solver_singlestep`` over any levels, timesteps and orders of calls."""
    if algorithm_type == "sde-dpmsolver++":
        made = _stochastic_columns(steps.levels, orders, solver_type)
    else:
        made = _columns(steps.levels, orders, algorithm_type, solver_type)
    columns = x0.columns() | made
    return signal_table(steps, columns, "dpm_solver_singlestep")


def _orders(steps: SignalSteps, solver_order: int, lower_order_final: bool) -> list[int]:
    """Return the order of each call: none goes back to before the first."""
    rounds, rest = divmod(steps.total, solver_order)
    if not lower_order_final and (rest or steps.ends_clean):
        raise ValueError(
            f"lower_order_final: expected True, as {steps.total} calls of order {solver_order} lead to sigma "
            f"{steps.levels.sigma[-1].item():.3g}, got False"
        )
    orders = list(range(1, solver_order + 1)) * rounds + list(range(1, rest + 1))
    if lower_order_final:
        if rest == 0 and solver_order > 1:  # the last round one call shorter, and a first-order one after it
            orders[-1] = 1
        if steps.ends_clean:
            orders[-1] = 1
    return [min(order, call + 1) for call, order in enumerate(orders[steps.skipped :])]


def _columns(
    levels: Levels, orders: Sequence[int], algorithm_type: AlgorithmType, solver_type: SolverType
) -> dict[str, Tensor]:
    points, forms = levels_of(levels), []
    factor, before = 1.0, dict[int, float]()  # of the call before: its sample is factor * base + these entries
    for call, order in enumerate(orders):
        base = call - order + 1
        over = interval(algorithm_type, points[base], points[call + 1])
        if order == 1:
            form, entries = Form(sample=over.sample), {call: over.first}
        else:
            entries = _higher_order(call, order, points, over, solver_type)
            form = Form(anchor=over.sample / factor).add(before, -over.sample / factor)
        forms.append(form.add(entries))
        factor, before = over.sample, entries
    return history_columns(forms, entry_of(algorithm_type, levels.at(slice(None, -1))))


def _higher_order(
    call: int, order: int, points: Sequence[tuple[float, float]], over: Interval, solver_type: SolverType
) -> dict[int, float]:
    """Return the factors of the entries of a step's calls (Lu et al. 2022, algorithms 1 and 2)."""
    base = lambda_of(points[call - order + 1])
    r0 = (lambda_of(points[call]) - base) / over.h
    if order == 2:
        w = second_order(over, r0, solver_type)
        return {call: w, call - 1: over.first - w}
    r1 = (lambda_of(points[call - 1]) - base) / over.h
    if solver_type == "midpoint":
        newer, older = over.second / r0, 0.0
    else:
        newer = (2 * over.third - over.second * r1) / (r0 - r1) / r0
        older = (over.second * r0 - 2 * over.third) / (r0 - r1) / r1
    return {call: newer, call - 1: older, call - 2: over.first - newer - older}


def _stochastic_columns(levels: Levels, orders: Sequence[int], solver_type: SolverType) -> dict[str, Tensor]:
    """Return the columns of the stochastic solver of order 1 or 2.

    A second call must not have the first one's noise, so the first leaves what the second takes of both its sample and
    its x_0: that is one entry.
    """
    points, forms = levels_of(levels), []
    left = Entry.original(levels.at(slice(None, -1)))
    for call, order in enumerate(orders):
        over = interval("sde-dpmsolver++", points[call - order + 1], points[call + 1])
        if order == 1:
            forms.append(Form(sample=over.sample, x0=over.first, noise=over.noise))
            continue
        r0 = (lambda_of(points[call]) - lambda_of(points[call - 1])) / over.h
        w = second_order(over, r0, solver_type)
        left.sample[call - 1], left.x0[call - 1] = over.sample, over.first - w
        forms.append(Form(x0=w, noise=over.noise, entries={call - 1: 1.0}))
    return history_columns(forms, left)
