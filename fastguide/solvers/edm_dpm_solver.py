"""DPM-Solver++ with the preconditioning of EDM: Lu et al. 2022, Karras et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from torch import Tensor

from ..schedules.levels import Levels
from ._columns import NO_VARIANCE
from ._dpm import SolverType, check_choices, multistep_columns
from ._edm import EDMPrediction, EDMSpacing, edm_original, edm_sigmas
from ._options import check_choice, check_flags
from ._unscaled import FinalSigmasType, SigmaSteps, loop_columns
from .begin import begins_anywhere, check_begin
from .entries import history_gradients
from .table import StepTable

EDMAlgorithm: TypeAlias = Literal["dpmsolver++", "sde-dpmsolver++"]


@begins_anywhere
def edm_dpm_solver(
    num_inference_steps: int | None = None,
    *,
    solver_order: int = 2,
    algorithm_type: EDMAlgorithm = "dpmsolver++",
    solver_type: SolverType = "midpoint",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    sigma_spacing: EDMSpacing = "karras",
    rho: float = 7.0,
    prediction_type: EDMPrediction = "epsilon",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigmas_type: FinalSigmasType = "zero",
    sigmas: Tensor | Sequence[float] | None = None,
    begin: int = 0,
) -> StepTable:
    """Return multistep DPM-Solver++'s steps for networks in EDM's preconditioning.

    They are ``dpm_solver``'s over lambda = -log(sigma), on the sample, inputs and timesteps of ``edm_euler``.

    Args:
        num_inference_steps: number of steps, if ``sigmas`` does not say them.
        solver_order: 1, 2 or 3; ``"sde-dpmsolver++"`` has no 3.
        algorithm_type: ``"dpmsolver++"``, or ``"sde-dpmsolver++"``, whose steps add noise.
        solver_type, lower_order_final, euler_at_final: as in ``dpm_solver``.
        sigma_min, sigma_max, sigma_data, sigma_spacing, rho, prediction_type, final_sigmas_type, sigmas: as in
            ``edm_euler``.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, its timesteps real. Its calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> edm_dpm_solver(sigmas=[1.0, 0.5, 0.0]).timesteps
    tensor([ 0.0000, -0.1733], dtype=torch.float64)
    """
    check_flags(lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    check_choice("algorithm_type", algorithm_type, EDMAlgorithm)
    check_choices(solver_order, algorithm_type, solver_type, 3 if algorithm_type == "dpmsolver++" else 2)
    every = edm_sigmas(num_inference_steps, sigma_min, sigma_max, sigma_spacing, rho, final_sigmas_type, sigmas)
    total = len(every) - 1
    check_begin(begin, total)
    visited = every[begin:]
    table = edm_dpm_solver_table(
        SigmaSteps(visited, visited[:-1].log() / 4),
        solver_order=solver_order,
        algorithm_type=algorithm_type,
        solver_type=solver_type,
        prediction_type=prediction_type,
        sigma_data=sigma_data,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        total=total,
    )
    first = visited[0].item() if sigmas is not None else sigma_max
    return replace(table, init_noise_sigma=math.hypot(first, 1.0) if begin == 0 else 1.0)


def edm_dpm_solver_table(
    steps: SigmaSteps,
    *,
    solver_order: int,
    algorithm_type: EDMAlgorithm,
    solver_type: SolverType,
    prediction_type: EDMPrediction,
    sigma_data: float,
    lower_order_final: bool,
    euler_at_final: bool,
    total: int,
) -> StepTable:
    """Return ``edm_dpm_solver`` over any sigmas and timesteps; ``total``: steps, with those before the first."""
    visited, timesteps = steps
    here = Levels.variance_exploding(visited[:-1])
    columns = multistep_columns(
        Levels.variance_exploding(visited),
        edm_original(prediction_type, here.sigma, sigma_data),
        solver_order=solver_order,
        algorithm_type=algorithm_type,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        total=total,
    )
    loop, first_in_scale = loop_columns(visited, sigma_data)
    variance = columns["out_noise"].square() if algorithm_type == "sde-dpmsolver++" else NO_VARIANCE
    return StepTable.from_columns(
        timesteps,
        columns | loop,
        gradients=history_gradients(columns, here, timesteps, variance),
        levels=here,
        first_in_scale=first_in_scale,
        name="edm_dpm_solver",
    )
