"""Euler's method with the preconditioning of EDM: Karras et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ._columns import NO_VARIANCE, gradient_forms
from ._edm import EDMPrediction, EDMSpacing, edm_original, edm_sigmas
from ._unscaled import Churn, FinalSigmasType, SigmaSteps, churn, euler_columns, loop_columns
from .table import StepTable


def edm_euler(
    num_inference_steps: int | None = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    sigma_spacing: EDMSpacing = "karras",
    rho: float = 7.0,
    prediction_type: EDMPrediction = "epsilon",
    final_sigmas_type: FinalSigmasType = "zero",
    sigmas: Tensor | Sequence[float] | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """Return Euler's steps for networks in EDM's preconditioning (Karras et al. 2022, table 1 and algorithm 2).

    The sample is ``x = x_0 + sigma * epsilon``, the model's input ``x / sqrt(sigma^2 + sigma_data^2)``, its timestep
    ``log(sigma) / 4``, and ``x_0 = c_skip * x + c_out * prediction``.

    Args:
        num_inference_steps: number of steps, if ``sigmas`` does not say them.
        sigma_min, sigma_max: the last and the first sigma.
        sigma_data: the standard deviation of the data.
        sigma_spacing: ``"karras"`` or ``"exponential"``.
        rho: of ``"karras"``.
        prediction_type: the sign of c_out, by the names of diffusers: ``"epsilon"``, plus, as in the paper;
            ``"v_prediction"``, minus. Neither is the noise.
        final_sigmas_type: the last step leads to ``"zero"``, or stays at the last sigma, ``"sigma_min"``.
        sigmas: where the steps begin and where the last one ends (0 or above), strictly falling, instead of a number
            and a spacing. (diffusers' argument of this name takes places between 0 and 1 of the spacing.)
        s_churn, s_tmin, s_tmax, s_noise: as in ``euler``.

    Returns:
        The step table, its timesteps real.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> edm_euler(3, sigma_max=1.0).timesteps
    tensor([ 0.0000, -0.6098, -1.5537], dtype=torch.float64)
    """
    visited = edm_sigmas(num_inference_steps, sigma_min, sigma_max, sigma_spacing, rho, final_sigmas_type, sigmas)
    steps = SigmaSteps(visited, visited[:-1].log() / 4)
    churned = churn(visited, s_churn, s_tmin, s_tmax, s_noise)
    table = edm_euler_table(steps, churned, prediction_type, sigma_data)
    return replace(table, init_noise_sigma=math.hypot(visited[0].item() if sigmas is not None else sigma_max, 1.0))


def edm_euler_table(steps: SigmaSteps, churned: Churn, prediction_type: EDMPrediction, sigma_data: float) -> StepTable:
    """Return ``edm_euler`` over any sigmas and timesteps."""
    visited, timesteps = steps
    now, after = visited[:-1], visited[1:]
    hat = churned.sigmas
    x0 = edm_original(prediction_type, hat, sigma_data)
    columns = euler_columns(churned, after, x0, None)
    loop, first_in_scale = loop_columns(visited, sigma_data)
    variance = columns["out_noise"].square() if bool((churned.noise > 0).any()) else NO_VARIANCE
    return StepTable.from_columns(
        timesteps,
        columns | loop,
        gradients=gradient_forms(columns, hat.square(), torch.zeros_like(hat), timesteps, variance),
        levels=Levels.variance_exploding(now),
        first_in_scale=first_in_scale,
        name="edm_euler",
    )
