"""What asks guidance for a shape, dtype and device alone, as the beginnings of momentum do: it computes nothing."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers.lazy_tensor import plain
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


FILLED = {
    "by position": lambda like, by: torch.full_like(like, by),
    "by keyword": lambda like, by: torch.full_like(like, fill_value=by),
    "all by keyword": lambda like, by: torch.full_like(input=like, fill_value=by),
}


@pytest.mark.parametrize("name", FILLED)
def test_a_traced_number_fills_a_tensor(name):
    """An output's element is a view, and no formula: torch asks its type for the rule."""
    output = traced(WHOLE, Fusion())
    assert torch.equal(FILLED[name](UNCOND, output[0, 0, 0]), FILLED[name](UNCOND, WHOLE[0, 0, 0]))


NAMED = {
    "zeros_like": lambda m: torch.zeros_like(input=m),
    "ones_like": lambda m: torch.ones_like(input=m),
    "full_like": lambda m: torch.full_like(input=m, fill_value=2.0),
    "empty_like": lambda m: torch.empty_like(input=m).zero_(),
    "rand_like": lambda m: torch.rand_like(input=m, generator=torch.Generator().manual_seed(1)),
    "randn_like": lambda m: torch.randn_like(input=m, generator=torch.Generator().manual_seed(1)),
    "normalize": lambda m: torch.nn.functional.normalize(input=m, dim=-1),
    "std": lambda m: torch.std(input=m, dim=(1, 2)),
    "norm": lambda m: torch.norm(input=m, dim=(1, 2)),
    "vector_norm": lambda m: torch.linalg.vector_norm(x=m, dim=(1, 2)),
    "sum": lambda m: torch.sum(input=m, dim=(1, 2), keepdim=True),
    "clamp": lambda m: torch.clamp(input=m, max=1.0),
    "clone": lambda m: torch.clone(input=m),
    "cat": lambda m: torch.cat(tensors=[m, m]),
    "stack": lambda m: torch.stack(tensors=[m, m]),
    "chunk": lambda m: torch.chunk(input=m, chunks=2)[1],
    "mul": lambda m: torch.mul(input=m, other=2.0),
}


@pytest.mark.parametrize("guided", ["an output", "a difference of halves", "a sum", "a formula"])
@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_by_keyword_is_the_same(name, guided):
    expected = NAMED[name](GUIDED[guided](UNCOND, COND))
    got = plain(NAMED[name](GUIDED[guided](*traced(WHOLE, Fusion()).chunk(2))))
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_what_fills_a_tensor_is_computed():
    u, c = traced(WHOLE, Fusion()).chunk(2)
    assert torch.equal(
        torch.full_like(UNCOND, (c - u).norm().reshape(())), torch.full_like(UNCOND, (COND - UNCOND).norm())
    )
