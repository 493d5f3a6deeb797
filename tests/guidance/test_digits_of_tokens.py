"""Guidance of short groups whose vectors nearly cancel: as near to float64 as plain torch, which adds up the vector."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastguide import AdaptiveProjected, Normalized, StepTable, guided_step

GUIDED = StepTable.from_columns(
    torch.zeros(1, dtype=torch.int64), {"out_pred": torch.ones(1, dtype=torch.float64)}, name="the prediction itself"
)
"""Its step returns the guided prediction."""
GROUPS = 1000


def norm(a, dim):
    return a.norm(dim=dim, keepdim=True)


def normalized(u, c, dim):
    m = u + 4 * (c - u)
    return norm(c, dim) / norm(m, dim) * m


def projected(u, c, dim):
    d = c - u
    d = d * (1 / norm(d, dim)).clamp(max=1)
    unit = torch.nn.functional.normalize(c, dim=dim)
    return u + 7.5 * (d - (d * unit).sum(dim, keepdim=True) * unit)


FORMULAS = {
    "normalized": (normalized, lambda dim: Normalized(4.0, dim=dim)),
    "projected": (projected, lambda dim: AdaptiveProjected(7.5, norm_dim=dim, norm_threshold=1.0)),
}


def drawn(size, length, dim, dtype=torch.float32):
    """Draw u and c, in groups of so many elements along ``dim``; c is so many times as long; m may be nearly 0."""
    u, c = torch.randn(2, 2, GROUPS, size, dtype=torch.float64)
    c *= length * norm(u, -1) / norm(c, -1)
    if length == 1 and dtype == torch.float32:  # in bfloat16, it would be 0
        c[:, ::10] = 0.75 * u[:, ::10] * (1 + 1e-3 * torch.randn(2, GROUPS // 10, size))
    return [each.transpose(2, dim).contiguous().to(dtype) for each in (u, c)]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dim", [2, 1])  # made by the kernel, and by torch before it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_errors_are_at_most_twice_those_of_plain_torch(name, dtype, dim, backend):
    """Measured as the norm of all that differs from float64; plain torch computes in float32."""
    formula, guidance = FORMULAS[name]
    for size, length in itertools.product((2, 4, 64), (1, 0.1, 1e-2, 1e-3, 1e-4)):
        u, c = drawn(size, length, dim, dtype)
        out = guided_step(GUIDED, 0, torch.zeros(u.shape), [u, c], guidance(dim), backend=backend)
        expected = formula(u.double(), c.double(), dim)
        ours, theirs = ((each - expected).norm() for each in (out, formula(u.float(), c.float(), dim)))
        assert ours <= 2 * theirs, (size, length)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dim", [2, 1])
@pytest.mark.parametrize("size", [1, 2])
def test_what_cancels_beyond_float64_is_not_divided_by(size, dim, backend):
    """Of so few elements, some are too short to be known from inner products, and are as long as these' rounding."""
    for length in (1, 1e-2, 1e-4, 1e-6, 0):
        u, c = drawn(size, length, dim)
        out = guided_step(GUIDED, 0, torch.zeros(u.shape), [u, c], Normalized(4.0, dim=dim), backend=backend)
        expected, unknown = norm(c.double(), dim), 1e-7 * norm(u.double(), dim)
        assert (norm(out.double(), dim) <= expected * (1 + 1e-3) + unknown).all()
        assert (norm(out.double(), dim) - expected).norm() <= 1e-5 * expected.norm() + unknown.norm()
    u = torch.full_like(u, 2.0)  # and a guided prediction of 0 is left as it is
    out = guided_step(GUIDED, 0, torch.zeros(u.shape), [u, 0.75 * u], Normalized(4.0, dim=dim), backend=backend)
    assert out.abs().max() == 0
