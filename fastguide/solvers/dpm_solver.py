"""DPM-Solver, multistep: Lu et al. 2022, and "DPM-Solver++: Fast Solver for Guided Sampling", 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..schedules.flow import FlowSchedule
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._dpm import AlgorithmType, SolverType, check_choices, multistep_columns
from ._options import check_flags
from ._signal_steps import prediction_of, signal_steps, signal_table
from ._unscaled import FinalSigmasType
from .begin import begins_anywhere
from .table import StepTable


@begins_anywhere
def dpm_solver(
    schedule: NoiseSchedule | FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    solver_order: int = 2,
    algorithm_type: AlgorithmType = "dpmsolver++",
    solver_type: SolverType = "midpoint",
    prediction_type: PredictionType | None = None,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigmas_type: FinalSigmasType = "zero",
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    sigma_spacing: SigmaSpacing | None = None,
    lambda_min_clipped: float = -math.inf,
    timesteps: Tensor | Sequence[int] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
    begin: int = 0,
) -> StepTable:
    """Return multistep DPM-Solver's steps, by default DPM-Solver++(2M).

    Over lambda = log(alpha / sigma), the linear part of the probability-flow ODE is solved exactly, and what the model
    predicts is extrapolated from earlier calls (Lu et al. 2022, "DPM-Solver++", algorithm 2):
    ``x' = sigma' / sigma * x - alpha' * (e^-h - 1) * (x_0 + (x_0 - x_0 of the last call) / (2 * r))``.

    Args:
        schedule: the noise schedule or the flow that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        solver_order: 1 (DDIM), 2 or 3; ``"sde-dpmsolver"`` has no 3. The third order of ``"sde-dpmsolver++"`` is
            diffusers', with a term that no paper has: with small steps it converges no faster than the first.
        algorithm_type: ``"dpmsolver++"`` extrapolates x_0, ``"dpmsolver"`` the noise; with ``"sde-"`` in front, each
            step adds noise.
        solver_type: ``"midpoint"`` or ``"heun"``, of the second order.
        prediction_type: what the model returns; ``None``: ``"epsilon"``, and of a flow ``"flow_prediction"``.
        lower_order_final: with fewer than 15 steps, the last two are of lower order, which is more stable.
        euler_at_final: the last step is of the first order in any case; it is also if it leads to sigma 0.
        final_sigmas_type: the last step leads to ``"zero"``, or to ``"sigma_min"``: the level of timestep 0, and of a
            flow the last level again. ``"zero"`` is for the algorithms with ``++`` alone.
        timestep_spacing: ``linspace``, ``leading`` or ``trailing``; the first two of one timestep more than steps,
            without the last. ``steps_offset`` is added in ``leading``.
        sigma_spacing: ``"karras"``, ``"exponential"`` (uniform in lambda) or ``"beta"`` between the schedule's largest
            and smallest sigma / alpha, and the model is told the nearest timesteps; ``None``: those of the timesteps.
        lambda_min_clipped: the first timestep's lambda is at least that; -5.1 for the cosine schedule.
        timesteps: the timesteps themselves, strictly falling, of a noise schedule.
        sigmas, mu: of a flow, as in ``FlowSchedule.steps``. Without ``sigmas``, they are equidistant before the shift.
            The model is told integers, 1000 times sigma without its fraction.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, whose calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import FlowSchedule, NoiseSchedule
    >>> table = dpm_solver(NoiseSchedule.scaled_linear(), 20, sigma_spacing="karras")
    >>> table, table.history_slots
    (StepTable(dpm_solver, 20 steps, timesteps 999 .. 0, device=cpu), 1)
    >>> dpm_solver(FlowSchedule(shift=3.0), 20, begin=12)
    StepTable(dpm_solver, 8 steps, timesteps 666 .. 136, device=cpu)
    """
    check_flags(lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    check_choices(solver_order, algorithm_type, solver_type, 2 if algorithm_type == "sde-dpmsolver" else 3)
    if final_sigmas_type == "zero" and not algorithm_type.endswith("++"):
        raise ValueError(f"final_sigmas_type: expected 'sigma_min' with {algorithm_type!r}, got 'zero'")
    steps = signal_steps(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        sigma_spacing=sigma_spacing,
        final_sigmas_type=final_sigmas_type,
        timesteps=timesteps,
        sigmas=sigmas,
        mu=mu,
        begin=begin,
        lambda_min_clipped=lambda_min_clipped,
    )
    columns = multistep_columns(
        steps.levels,
        prediction_of(schedule, prediction_type, steps.here),
        solver_order=solver_order,
        algorithm_type=algorithm_type,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        total=steps.total,
    )
    return signal_table(steps, columns, "dpm_solver")
