"""What a model may predict, as coefficients: x_0 and epsilon from (x_t, prediction), and back.

The one place where epsilon, x_0, v and the score are related. Everything is float64 and vectorised over timesteps;
``abar`` is a tensor of alphas_cumprod.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

PredictionType: TypeAlias = Literal["epsilon", "sample", "v_prediction", "score"]
GradientForm: TypeAlias = Literal["epsilon", "epsilon_after_clip", "mean"]


class Linear(NamedTuple):
    """The expression ``scale * (sample * x_t + pred * prediction)``.

    Where signal is scarce, x_t and the noise in it nearly cancel: the difference comes first and exact, what magnifies
    it comes after. Multiplied out, the rounding of each large product would stay in x_0.
    """

    scale: Tensor
    sample: Tensor
    pred: Tensor


def check_prediction_type(name: str, value: str) -> None:
    """Refuse a prediction type that is not one of ``PredictionType``."""
    if value not in get_args(PredictionType):
        raise ValueError(f"{name}: expected one of {get_args(PredictionType)}, got {value!r}")


def original_from(prediction_type: str, abar: Tensor) -> Linear:
    """x_0 from x_t and the prediction (Ho et al. 2020, eq. 15; v: Salimans & Ho 2022, appendix D).

    The scale is infinite where the prediction says nothing of x_0 (epsilon and score at abar = 0).
    """
    zero, one = torch.zeros_like(abar), torch.ones_like(abar)
    if prediction_type == "epsilon":
        return Linear(abar.rsqrt(), one, -(1 - abar).sqrt())
    if prediction_type == "sample":
        return Linear(one, zero, one)
    if prediction_type == "v_prediction":
        return Linear(one, abar.sqrt(), -(1 - abar).sqrt())
    return Linear(abar.rsqrt(), one, 1 - abar)  # score: epsilon = -sqrt(1 - abar) * score


def epsilon_from(prediction_type: str, abar: Tensor) -> Linear:
    """epsilon from x_t and the prediction (score: Song et al. 2021, ``epsilon = -sqrt(1 - abar) * score``)."""
    zero, one = torch.zeros_like(abar), torch.ones_like(abar)
    if prediction_type == "epsilon":
        return Linear(one, zero, one)
    if prediction_type == "sample":
        return Linear((1 - abar).rsqrt(), one, -abar.sqrt())
    if prediction_type == "v_prediction":
        return Linear(one, (1 - abar).sqrt(), abar.sqrt())
    return Linear(one, zero, -(1 - abar).sqrt())


def from_original_and_epsilon(prediction_type: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """What a perfect model predicts, as coefficients of x_0 and of epsilon: what a model is trained on."""
    zero, one = torch.zeros_like(abar), torch.ones_like(abar)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "sample":
        return one, zero
    if prediction_type == "v_prediction":
        return -(1 - abar).sqrt(), abar.sqrt()
    return zero, -(1 - abar).rsqrt()


def convert(source: str, target: str, abar: Tensor) -> Linear:
    """One prediction type from another, both at the same x_t."""
    if source == target:  # exact, also where x_0 or the score cannot be formed
        return Linear(torch.ones_like(abar), torch.zeros_like(abar), torch.ones_like(abar))
    original, epsilon = original_from(source, abar), epsilon_from(source, abar)
    if target == "sample":
        return original
    if target == "epsilon":
        return epsilon
    if target == "score":
        return epsilon._replace(scale=-(1 - abar).rsqrt() * epsilon.scale)
    # v = sqrt(abar) * epsilon - sqrt(1 - abar) * x_0, which is (sqrt(abar) * x_t - x_0) / sqrt(1 - abar) and
    # (epsilon - sqrt(1 - abar) * x_t) / sqrt(abar): the one that has the prediction itself
    if source == "sample":
        return Linear((1 - abar).rsqrt(), abar.sqrt(), -torch.ones_like(abar))
    return Linear(abar.rsqrt(), -(1 - abar).sqrt(), epsilon.pred)
