"""What asks guidance for a shape, dtype and device alone, as the beginnings of momentum do: it computes nothing."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers.traced import Fusion, traced

WHOLE = torch.randn(4, 3, 5)
UNCOND, COND = WHOLE.chunk(2)

LIKE = {
    "zeros": torch.zeros_like,
    "zeros of 64 bits": lambda m: torch.zeros_like(m, dtype=torch.float64),
    "zeros of its own dtype": lambda m: torch.zeros_like(m, dtype=None),
    "full": lambda m: torch.full_like(m, 3.0),
    "empty": lambda m: torch.empty_like(m).zero_(),
    "noise": lambda m: torch.randn_like(m, generator=torch.Generator().manual_seed(1)),
    "noise between 0 and 1": lambda m: torch.rand_like(m, generator=torch.Generator().manual_seed(1)),
}
GUIDED = {
    "an output": lambda u, c: u,
    "a difference of halves": lambda u, c: c - u,
    "a sum": lambda u, c: (3.0 * u - c).double(),
    "a formula": lambda u, c: c * (u.std((1, 2), keepdim=True) / c.std((1, 2), keepdim=True)),
    "a number": lambda u, c: (c - u).norm(2, (1, 2), keepdim=True),
}


@pytest.mark.parametrize("guided", GUIDED)
@pytest.mark.parametrize("name", LIKE)
def test_what_asks_for_no_values_computes_none(name, guided):
    """As the beginnings of momentum do."""
    fusion = Fusion()
    fusion.tries = True
    made, expected = GUIDED[guided](*traced(WHOLE, fusion).chunk(2)), LIKE[name](GUIDED[guided](UNCOND, COND))
    got = LIKE[name](made)
    assert type(got) is torch.Tensor
    assert (got.dtype, got.device) == (expected.dtype, expected.device)
    assert torch.equal(got, expected)
    assert fusion.tries


def test_what_fills_a_tensor_is_computed():
    u, c = traced(WHOLE, Fusion()).chunk(2)
    assert torch.equal(
        torch.full_like(UNCOND, (c - u).norm().reshape(())), torch.full_like(UNCOND, (COND - UNCOND).norm())
    )
