"""The papers' formulas written out step by step, independently of fastguide's rows; in whatever dtype they are given.

In float64 this is the truth; in float32 or bfloat16 it is "plain torch", whose own error sets the tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def linear_alphas_cumprod(steps: int = 1000) -> Tensor:
    """Ho et al. 2020, section 4: betas from 1e-4 to 0.02; always in float64."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def leading_timesteps(count: int, steps: int = 1000) -> list[int]:
    """Song et al. 2021, appendix D.2, linear: every (steps / count)-th timestep from 0 on, here latest first."""
    return [steps // count * i for i in reversed(range(count))]


def guided_prediction(predictions: list[Tensor], scales: list[float | Tensor]) -> Tensor:
    """Classifier-free guidance and composition as diffusers writes them."""
    m = predictions[0]
    for p, s in zip(predictions[1:], scales, strict=True):
        m = m + s * (p - predictions[0])
    return m


def original_and_epsilon(prediction_type: str, x: Tensor, m: Tensor, a: float) -> tuple[Tensor, Tensor]:
    if prediction_type == "epsilon":
        return (x - math.sqrt(1 - a) * m) / math.sqrt(a), m
    if prediction_type == "sample":
        return m, (x - math.sqrt(a) * m) / math.sqrt(1 - a)
    if prediction_type == "v_prediction":
        return math.sqrt(a) * x - math.sqrt(1 - a) * m, math.sqrt(a) * m + math.sqrt(1 - a) * x
    assert prediction_type == "score"
    return original_and_epsilon("epsilon", x, -math.sqrt(1 - a) * m, a)


def noised(x0: Tensor, z: Tensor, a: float) -> Tensor:
    """Ho et al. 2020, eq. 4."""
    return math.sqrt(a) * x0 + math.sqrt(1 - a) * z


def log_probability_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, labels: Tensor
) -> Tensor:
    """Dhariwal & Nichol 2021, section 4: of log p(y | x_t), each sample of its own label."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = classifier(x, t)
        log_probability = logits[torch.arange(len(x)), labels] - logits.logsumexp(1)
        return torch.autograd.grad(log_probability.sum(), x)[0]


def inpainted(x: Tensor, image: Tensor, mask: Tensor, z: Tensor, a: float) -> Tensor:
    """Lugmayr et al. 2022, eq. 8: where the mask is 0, the known image at the sample's level."""
    return mask * x + (1 - mask) * noised(image, z, a)


def clipped(x0: Tensor, clip: float | None) -> Tensor:
    return x0 if clip is None else x0.clamp(-clip, clip)


def guided_original_and_epsilon(
    prediction_type: str,
    x: Tensor,
    m: Tensor,
    a: float,
    clip: float | None,
    form: str | None,
    sg: Tensor | None,
    rederive_epsilon: bool,
) -> tuple[Tensor, Tensor]:
    """Predicted x_0 and epsilon after clip and classifier guidance, in the order that the form asks for."""
    x0, epsilon = original_and_epsilon(prediction_type, x, m, a)
    if form == "epsilon":  # shift epsilon, derive x_0 from it, clip
        epsilon = epsilon - math.sqrt(1 - a) * sg
        x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
    x0 = clipped(x0, clip)
    if rederive_epsilon:
        epsilon = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    if form == "epsilon_after_clip":  # guided-diffusion's condition_score, after the clip
        shift = -math.sqrt(1 - a) * sg
        epsilon = epsilon + shift
        x0 = x0 - math.sqrt(1 - a) / math.sqrt(a) * shift
    return x0, epsilon


def ddim_step(
    x: Tensor,
    m: Tensor,
    a: float,
    a_prev: float,
    *,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    clip: float | None = None,
    use_clipped: bool = False,
    form: str | None = None,
    sg: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Song et al. 2021, eq. 12 and 16."""
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
    x0, epsilon = guided_original_and_epsilon(prediction_type, x, m, a, clip, form, sg, use_clipped)
    result = math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * epsilon
    if form == "mean":
        result = result + sigma**2 * sg
    if sigma > 0:
        result = result + sigma * z
    return result


def ddpm_step(
    x: Tensor,
    m: Tensor,
    a: float,
    a_prev: float,
    *,
    last: bool,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip: float | None = None,
    form: str | None = None,
    sg: Tensor | None = None,
    v: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Ho et al. 2020, eq. 6-7; the variances of Nichol & Dhariwal 2021, eq. 15."""
    alpha = a / a_prev
    beta = 1 - alpha
    x0, _ = guided_original_and_epsilon(prediction_type, x, m, a, clip, form, sg, False)
    mean = math.sqrt(a_prev) * beta / (1 - a) * x0 + math.sqrt(alpha) * (1 - a_prev) / (1 - a) * x
    small = max((1 - a_prev) / (1 - a) * beta, 1e-20)
    variance: float | Tensor
    if variance_type == "learned":
        variance = torch.exp(v)
    elif variance_type == "learned_range":
        fraction = (v + 1) / 2
        variance = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(small))
    else:
        variance = small if "small" in variance_type else beta
    if form == "mean":
        mean = mean + variance * sg
    return mean if last else mean + variance**0.5 * z
