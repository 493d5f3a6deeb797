"""EDM's preconditioning and its sigmas: Karras et al. 2022, table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .._counts import check_count
from ..schedules.predictions import Linear
from ..schedules.sigmas import given_sigmas, spaced_sigmas
from ._columns import check_range
from ._options import check_choice
from ._unscaled import FinalSigmasType

EDMPrediction: TypeAlias = Literal["epsilon", "v_prediction"]
EDMSpacing: TypeAlias = Literal["karras", "exponential"]


def edm_original(prediction_type: EDMPrediction, sigma: Tensor, sigma_data: float) -> Linear:
    """Return x_0 = c_skip * x + c_out * prediction; of ``"v_prediction"``, c_out has the other sign."""
    check_choice("prediction_type", prediction_type, EDMPrediction)
    check_range("sigma_data", sigma_data, 0.0, math.inf, above=True)
    radius = (sigma.square() + sigma_data**2).sqrt()
    c_out = sigma * sigma_data / radius
    c_skip = sigma_data**2 / radius.square()
    return Linear(torch.ones_like(sigma), c_skip, c_out if prediction_type == "epsilon" else -c_out)


def edm_sigmas(
    num_inference_steps: int | None,
    sigma_min: float,
    sigma_max: float,
    sigma_spacing: EDMSpacing,
    rho: float,
    final_sigmas_type: FinalSigmasType,
    sigmas: Tensor | Sequence[float] | None,
) -> Tensor:
    """Return where the steps begin, and where the last one ends."""
    check_choice("final_sigmas_type", final_sigmas_type, FinalSigmasType)
    if sigmas is not None:
        given = given_sigmas("sigmas", sigmas, least=2, zero_last=True)
        if num_inference_steps is not None and num_inference_steps != len(given) - 1:
            raise ValueError(f"num_inference_steps: expected {len(given) - 1}, got {num_inference_steps}")
        return given
    if num_inference_steps is None:
        raise ValueError("num_inference_steps: expected a number, or sigmas=, got None")
    check_count("num_inference_steps", num_inference_steps)
    check_choice("sigma_spacing", sigma_spacing, EDMSpacing)
    check_range("rho", rho, 0.0, math.inf, above=True)
    check_range("sigma_min", sigma_min, 0.0, sigma_max, above=True)
    begins = spaced_sigmas(sigma_spacing, num_inference_steps, sigma_max, sigma_min, rho=rho)
    return torch.cat([begins, begins[-1:] if final_sigmas_type == "sigma_min" else begins.new_zeros(1)])
