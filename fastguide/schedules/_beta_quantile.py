"""The quantile of the beta distribution in float64, so that beta spacing needs no scipy."""

from __future__ import annotations

import math

_MOST_ITERATIONS = 200
_TINY = 1e-300


def beta_quantile(p: float, a: float, b: float) -> float:
    """Return the x in [0, 1] with I_x(a, b) = p: Newton's method, kept in a bracket by bisection.

    Args:
        p: a probability, 0 to 1.
        a: the first parameter of the distribution, positive.
        b: the second.

    >>> f"{beta_quantile(0.25, 0.6, 0.6):.12f}", beta_quantile(0.5, 0.6, 0.6)
    ('0.175680378653', 0.5)
    """
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if p == 0.5 and a == b:
        return 0.5
    if p > cumulative_beta(0.5, a, b):
        return 1 - beta_quantile(1 - p, b, a)  # small numbers keep their digits
    low, high = 0.0, 0.5
    log_beta = _log_beta(a, b)
    x = min(math.exp((math.log(p * a) + log_beta) / a), high)  # I_x(a, b) = x^a / (a * B(a, b)) for small x
    for _ in range(_MOST_ITERATIONS):
        error = cumulative_beta(x, a, b) - p
        low, high = (low, x) if error > 0 else (x, high)
        density = math.exp((a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - log_beta)
        closer = x - error / density
        if not low < closer < high:
            closer = (low + high) / 2
        if abs(closer - x) <= 1e-16 * x:
            return closer
        x = closer
    return x


def cumulative_beta(x: float, a: float, b: float) -> float:
    """Return I_x(a, b), the regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction of the complement converges faster
        return 1 - cumulative_beta(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b)) / a
    return front * _continued_fraction(x, a, b)


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Return 1 / (1 + d_1 / (1 + d_2 / (1 + ...))), evaluated forwards by Lentz's method."""
    value, c, d = 1.0, 1.0, 0.0
    for i in range(_MOST_ITERATIONS):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _not_zero(1 + term * d)
        c = _not_zero(1 + term / c)
        value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value - 1


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
