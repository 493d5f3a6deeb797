"""What a model may predict, as coefficients: x_0 and epsilon from (x_t, prediction), and back.

The one place that relates epsilon, x_0, v, the score and a flow's velocity; everything is vectorised over the timesteps
of ``Levels``. With a level's alpha and sigma, ``x_t = alpha * x_0 + sigma * epsilon``;
``v = (alpha * epsilon - sigma * x_0) / r``, where r is the root of alpha^2 + sigma^2, 1 on variance-preserving
schedules; ``score = -epsilon / sigma``. A flow's velocity is ``epsilon - x_0``, the slope of x_t in sigma where
alpha = 1 - sigma, and has a meaning there only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .levels import Levels

PredictionType: TypeAlias = Literal["epsilon", "sample", "v_prediction", "score", "flow_prediction"]
"""What a model predicts: the noise epsilon, x_0, v, the score, or the velocity of flow matching."""
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

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of a step table that make x_0 of it."""
        return {"x0_scale": self.scale, "x0_sample": self.sample, "x0_pred": self.pred}


def check_prediction_type(name: str, value: str) -> None:
    """Refuse a prediction type that is not one of ``PredictionType``."""
    if value not in get_args(PredictionType):
        raise ValueError(f"{name}: expected one of {get_args(PredictionType)}, got {value!r}")


def check_flow_matching(prediction_type: str, levels: Levels) -> None:
    """Refuse ``flow_prediction`` at levels that are not a flow's."""
    if prediction_type == "flow_prediction" and not levels.is_flow_matching:
        alpha, sigma = (values[(levels.alpha + levels.sigma - 1).abs().argmax()].item() for values in levels)
        raise ValueError(
            "prediction_type: 'flow_prediction' is epsilon - x_0 of flow matching, where alpha = 1 - sigma; expected "
            "'epsilon', 'sample', 'v_prediction' or 'score' with this schedule, which has "
            f"alpha = {alpha:.4g} and sigma = {sigma:.4g}"
        )


def original_from(prediction_type: str, levels: Levels) -> Linear:
    """Return x_0 from x_t and the prediction (Ho et al. 2020, eq. 15; v: Salimans & Ho 2022, appendix D).

    For a flow, ``x_0 = x_t - sigma * prediction`` (Lipman et al. 2023, with alpha = 1 - sigma). The scale is infinite
    where the prediction says nothing of x_0 (epsilon and score at alpha = 0).
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
    if prediction_type == "flow_prediction":
        check_flow_matching(prediction_type, levels)
        return Linear(one, one, -sigma)
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
    if prediction_type == "flow_prediction":
        check_flow_matching(prediction_type, levels)
        return Linear(one, one, alpha)
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
    if prediction_type == "flow_prediction":
        check_flow_matching(prediction_type, levels)
        return -one, one
    return zero, -1 / sigma


def convert(source: str, target: str, levels: Levels) -> Linear:
    """Return one prediction type from another, both at the same x_t."""
    alpha, sigma = levels
    check_flow_matching(target, levels)
    check_flow_matching(source, levels)
    if source == target:  # exact, also where x_0 or the score cannot be formed
        return Linear(torch.ones_like(alpha), torch.zeros_like(alpha), torch.ones_like(alpha))
    original, epsilon = original_from(source, levels), epsilon_from(source, levels)
    if target == "sample":
        return original
    if target == "epsilon":
        return epsilon
    if target == "score":
        return epsilon._replace(scale=-epsilon.scale / sigma)
    if target == "flow_prediction":
        return _velocity_from(source, levels)
    # v is (alpha * x_t - r^2 * x_0) / (sigma * r), and (r^2 * epsilon - sigma * x_t) / (alpha * r): whichever has the
    # prediction itself
    r = levels.radius
    if source == "sample":
        return Linear(1 / (sigma * r), alpha, -r.square())
    if source == "flow_prediction":
        return Linear(1 / r, alpha - sigma, r.square())
    return Linear(1 / (alpha * r), -sigma, r.square() * epsilon.pred)


def _velocity_from(source: str, levels: Levels) -> Linear:
    """Return a flow's velocity, ``(x_t - x_0) / sigma``, which is also ``(epsilon - x_t) / alpha``."""
    alpha, sigma = levels
    one = torch.ones_like(alpha)
    if source == "sample":
        return Linear(1 / sigma, one, -one)
    if source == "v_prediction":
        r = levels.radius
        return Linear(r.square().reciprocal(), sigma - alpha, r)
    return Linear(1 / alpha, -one, epsilon_from(source, levels).pred)
