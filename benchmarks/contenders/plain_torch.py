"""Write the guided step in plain torch, as a careful user does, without synchronisation: what torch.compile fuses.

A solver is a readable function. What is timed is its straight lines, which ``straight_lines`` records: at each call,
torch.compile checks whatever a function looks up, and a solver as it is written here would be 3 to 9 % slower at
(1, 4, 64, 64) for its helpers, names and optional arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from ..workloads import COMPOSED_SCALES, GRADIENT_SCALE


class Coefficients(NamedTuple):
    """What a step multiplies by: numbers, or the elements of a tensor. ``a`` is abar, ``a_prev`` the next step's."""

    sqrt_a: float
    sqrt_one_minus_a: float
    sqrt_recip_a: float
    sqrt_a_prev: float
    sqrt_one_minus_a_prev: float
    mean_x0: float  # in the posterior's mean
    mean_x: float
    sigma: float  # the posterior's standard deviation
    logvar_base: float  # the log-variance is base + span * v, where v is what the model learned
    logvar_span: float
    epsilon_gradient: float
    mean_gradient: float


def coefficients(a: float, a_prev: float) -> Coefficients:
    """Compute a step's coefficients (Ho et al. 2020, eq. 7; Nichol and Dhariwal 2021, eq. 15)."""
    alpha = a / a_prev
    variance = max((1 - a_prev) / (1 - a) * (1 - alpha), 1e-20)
    low, high = math.log(variance), math.log(1 - alpha)
    return Coefficients(
        sqrt_a=math.sqrt(a),
        sqrt_one_minus_a=math.sqrt(1 - a),
        sqrt_recip_a=1 / math.sqrt(a),
        sqrt_a_prev=math.sqrt(a_prev),
        sqrt_one_minus_a_prev=math.sqrt(1 - a_prev),
        mean_x0=math.sqrt(a_prev) * (1 - alpha) / (1 - a),
        mean_x=math.sqrt(alpha) * (1 - a_prev) / (1 - a),
        sigma=math.sqrt(variance),
        logvar_base=(low + high) / 2,
        logvar_span=(high - low) / 2,
        epsilon_gradient=math.sqrt(1 - a) * GRADIENT_SCALE,
        mean_gradient=variance * GRADIENT_SCALE,
    )


class Terms(NamedTuple):
    """The tensors of a step, in float32; ``None`` where the step has no such term."""

    sample: Tensor
    predictions: list[Tensor]
    noise: Tensor | None = None
    variance: Tensor | None = None
    epsilon_gradient: Tensor | None = None
    mean_gradient: Tensor | None = None


def guided(predictions: Sequence[Tensor], scales: Sequence[float] = COMPOSED_SCALES) -> Tensor:
    """Return m = p_0 + sum_k s_k (p_k - p_0) (Ho and Salimans 2022, eq. 6; Liu et al. 2022, eq. 11)."""
    m = predictions[0]
    for scale, prediction in zip(scales, predictions[1:], strict=False):
        m = m + scale * (prediction - predictions[0])
    return m


def _epsilon_and_x0(c: Coefficients, t: Terms) -> tuple[Tensor, Tensor]:
    epsilon = guided(t.predictions)
    if t.epsilon_gradient is not None:  # Dhariwal and Nichol 2021, algorithm 2
        epsilon = epsilon - c.epsilon_gradient * t.epsilon_gradient
    return epsilon, c.sqrt_recip_a * (t.sample - c.sqrt_one_minus_a * epsilon)


def ddim(c: Coefficients, t: Terms) -> Tensor:
    """Compute a DDIM step (Song et al. 2021, eq. 12 with sigma = 0)."""
    epsilon, x0 = _epsilon_and_x0(c, t)
    return c.sqrt_a_prev * x0 + c.sqrt_one_minus_a_prev * epsilon


def ddpm(c: Coefficients, t: Terms, *, clip: bool = False) -> Tensor:
    """Compute a DDPM step (Ho et al. 2020, eq. 7), with the learned variance of Nichol and Dhariwal 2021 if given."""
    _, x0 = _epsilon_and_x0(c, t)
    mean = c.mean_x0 * (x0.clamp(-1, 1) if clip else x0) + c.mean_x * t.sample
    logvar = None if t.variance is None else c.logvar_base + c.logvar_span * t.variance
    if t.mean_gradient is not None:  # Dhariwal and Nichol 2021, algorithm 1
        if logvar is None:
            mean = mean + c.mean_gradient * t.mean_gradient
        else:
            mean = mean + logvar.exp() * (GRADIENT_SCALE * t.mean_gradient)
    if t.noise is None:
        return mean
    return mean + (c.sigma if logvar is None else (0.5 * logvar).exp()) * t.noise


def ddpm_clipped(c: Coefficients, t: Terms) -> Tensor:
    """Compute a DDPM step with x_0 clipped to [-1, 1]."""
    return ddpm(c, t, clip=True)


def add_noise(c: Coefficients, t: Terms) -> Tensor:
    """Noise an original sample (Ho et al. 2020, eq. 4)."""
    assert t.noise is not None
    return c.sqrt_a * t.sample + c.sqrt_one_minus_a * t.noise


SOLVERS: dict[str, Callable[[Coefficients, Terms], Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "ddpm learned": ddpm,
    "ddpm clipped": ddpm_clipped,
    "add_noise": add_noise,
}
"""By the names in ``workloads.SOLVERS``."""


def straight_lines(
    solver: str,
    num_predictions: int,
    terms: Sequence[str] = (),
    *,
    numbers: Coefficients | None = None,
    out: bool = False,
) -> Callable[..., Tensor]:
    """Record what a solver does with the terms that a step has, as a function of tensors without names or branches.

    Args:
        solver: one of ``SOLVERS``.
        num_predictions: how many predictions the function takes.
        terms: the names in ``Terms`` of the other tensors that it takes.
        numbers: the coefficients to write into its lines; ``None``: it takes them, ``torch.tensor(coefficients(...))``,
            as its first argument, so that torch.compile compiles one function for all steps.
        out: whether it writes to a tensor that it takes as its last argument; otherwise it makes a new one.

    Returns:
        A function of [row,] sample, each prediction, each of ``terms`` in their order [, out].
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def argument(name: str) -> Any:
        return fx.Proxy(graph.placeholder(name), tracer)

    row = argument("row") if numbers is None else numbers
    sample = argument("sample")
    predictions = [argument(f"p{k}").float() for k in range(num_predictions)]
    given = {name: argument(name).float() for name in terms}
    c = Coefficients(*(row[k] for k in range(len(Coefficients._fields))))
    result: Any = SOLVERS[solver](c, Terms(sample.float(), predictions, **given))
    result = argument("out").copy_(result) if out else result.to(sample.dtype)
    graph.output(result.node)
    graph.eliminate_dead_code()
    function: Callable[..., Tensor] = fx.GraphModule({}, graph).forward
    return function
