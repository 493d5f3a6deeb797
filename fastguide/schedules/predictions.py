"""What a model may predict, as coefficients: x_0 and epsilon from (x_t, prediction), and back.

The one place that relates epsilon, x_0, v and the score; everything is vectorised over the timesteps of ``Levels``.
With a level's alpha and sigma, ``x_t = alpha * x_0 + sigma * epsilon``; ``v = (alpha * epsilon - sigma * x_0) / r``,
where r is the root of alpha^2 + sigma^2, 1 on variance-preserving schedules; ``score = -epsilon / sigma``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .levels import Levels

PredictionType: TypeAlias = Literal["epsilon", "sample", "v_prediction", "score"]
"""What a model predicts: the noise epsilon, x_0, v, or the score."""
GradientForm: TypeAlias = Literal["epsilon", "epsilon_after_clip", "mean"]
"""What a classifier's gradient moves: the noise prediction before or after x_0 is clipped, or the mean of the step."""


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


def original_from(prediction_type: str, levels: Levels) -> Linear:
    """Return x_0 from x_t and the prediction (Ho et al. 2020, eq. 15; v: Salimans & Ho 2022, appendix D).

    The scale is infinite where the prediction says nothing of x_0 (epsilon and score at alpha = 0).
    """
    alpha, sigma = levels
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        return Linear(1 / alpha, one, -sigma)
    if prediction_type == "sample":
        return Linear(one, zero, one)
    if prediction_type == "v_prediction":
        r = levels.radius
        return Linear(one, alpha / r.square(), -sigma / r)
    return Linear(1 / alpha, one, sigma.square())  # score: epsilon = -sigma * score


def epsilon_from(prediction_type: str, levels: Levels) -> Linear:
    """Return epsilon from x_t and the prediction (score: Song et al. 2021, ``epsilon = -sigma * score``)."""
    alpha, sigma = levels
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        return Linear(one, zero, one)
    if prediction_type == "sample":
        return Linear(1 / sigma, one, -alpha)
    if prediction_type == "v_prediction":
        r = levels.radius
        return Linear(one, sigma / r.square(), alpha / r)
    return Linear(one, zero, -sigma)


def from_original_and_epsilon(prediction_type: str, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return what a perfect model predicts, as coefficients of x_0 and of epsilon: what a model is trained on."""
    alpha, sigma = levels
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "sample":
        return one, zero
    if prediction_type == "v_prediction":
        return -sigma / levels.radius, alpha / levels.radius
    return zero, -1 / sigma


def convert(source: str, target: str, levels: Levels) -> Linear:
    """Return one prediction type from another, both at the same x_t."""
    alpha, sigma = levels
    if source == target:  # exact, also where x_0 or the score cannot be formed
        return Linear(torch.ones_like(alpha), torch.zeros_like(alpha), torch.ones_like(alpha))
    original, epsilon = original_from(source, levels), epsilon_from(source, levels)
    if target == "sample":
        return original
    if target == "epsilon":
        return epsilon
    if target == "score":
        return epsilon._replace(scale=-epsilon.scale / sigma)
    # v is (alpha * x_t - r^2 * x_0) / (sigma * r), and (r^2 * epsilon - sigma * x_t) / (alpha * r): whichever has the
    # prediction itself
    r = levels.radius
    if source == "sample":
        return Linear(1 / (sigma * r), alpha, -r.square())
    return Linear(1 / (alpha * r), -sigma, r.square() * epsilon.pred)
