"""Integrals of Lagrange's polynomials, also under an exponential: the weights of exponential Adams methods."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

_POINTS = 32  # exact for polynomials of degree 63; under an exponential that grows by e^16, to rounding
_MOST_GROWTH = 16.0


def lagrange_integrals(nodes: Sequence[float], low: float, high: float, growth: float = 0.0) -> list[float]:
    """Return the integrals from ``low`` to ``high`` of ``e^(growth * u) * l_j(u)``, l_j being 1 at node j, 0 at others.

    By the rule of Gauss and Legendre, in which nothing cancels as it does in the closed forms where nodes are close.
    An interval over which the exponential grows too much for the rule is cut into shorter ones.

    >>> [round(weight, 9) for weight in lagrange_integrals([0.0, -1.0], 0.0, 1.0)]  # Adams and Bashforth's two steps
    [1.5, -0.5]
    """
    pieces = max(math.ceil(abs(growth * (high - low)) / _MOST_GROWTH), 1)
    if pieces > 1:
        ends = [low + (high - low) * piece / pieces for piece in range(pieces + 1)]
        parts = [lagrange_integrals(nodes, ends[piece], ends[piece + 1], growth) for piece in range(pieces)]
        return [math.fsum(values) for values in zip(*parts, strict=True)]
    places, weights = _gauss_legendre()
    half, centre = (high - low) / 2, (high + low) / 2
    totals = [0.0] * len(nodes)
    for place, weight in zip(places, weights, strict=True):
        u = centre + half * place
        factor = half * weight * math.exp(growth * u)
        for j, node in enumerate(nodes):
            others = (other for i, other in enumerate(nodes) if i != j)
            totals[j] += factor * math.prod((u - other) / (node - other) for other in others)
    return totals


@functools.cache
def _gauss_legendre() -> tuple[list[float], list[float]]:
    """Return the places and weights on [-1, 1]: eigenvalues of Jacobi's matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, _POINTS, dtype=torch.float64, device="cpu")
    beside = k / (4 * k.square() - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return places.tolist(), (2 * vectors[0].square()).tolist()
