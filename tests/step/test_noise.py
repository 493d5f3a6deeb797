"""Noise on the CPU is torch's own stream: the values of torch.randn, and the generator ends as after it."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.cases import DTYPES, TABLES
from tests.support.step_inputs import make_inputs

SIZES = [(1,), (3, 5), (1, 16), (2, 8), (3, 17, 19), (2, 3, 64, 64)]  # below and above torch's block of 16; tails


def step(table, index, inputs, backend=None, **arguments):
    return fastguide.guided_step(table, index, inputs.sample, inputs.predictions, backend=backend, **arguments)


def generators(seed=5):
    return [torch.Generator().manual_seed(seed) for _ in range(2)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_generator_draws_torch_randn(backend, shape, dtype, generator):
    table = TABLES["ddpm"]
    inputs = make_inputs(table, shape, generator, count=1, dtype=dtype)
    ours, theirs = generators()
    for _ in range(2):  # the second draw sees a cached value, if torch keeps one
        got = step(table, 2, inputs, backend, generator=ours)
        expected = step(table, 2, inputs, backend, noise=torch.randn(shape, dtype=dtype, generator=theirs))
        assert torch.equal(got, expected)
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_generator_draws_torch_randn_for_channels_last(backend, generator):
    table = TABLES["ddpm"]
    inputs = make_inputs(table, (2, 3, 8, 8), generator, count=1)
    inputs = inputs.map(lambda t: t.contiguous(memory_format=torch.channels_last))
    ours, theirs = generators()
    got = step(table, 2, inputs, backend, generator=ours)
    noise = torch.randn(2, 3, 8, 8, generator=theirs).contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, step(table, 2, inputs, backend, noise=noise))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("alias", ["apart", "the sample", "the prediction", "other dtype"])
def test_generator_and_out(backend, alias, generator):
    """Noise may be drawn into out's memory, but not over an input that is still to be read."""
    table = TABLES["ddpm"]
    inputs = make_inputs(table, (2, 3, 40), generator, count=1)
    ours, theirs = generators()
    expected = step(table, 2, inputs, backend, noise=torch.randn(2, 3, 40, generator=theirs))
    out = {
        "apart": torch.full((2, 3, 40), torch.nan),
        "the sample": inputs.sample,
        "the prediction": inputs.predictions[0],
        "other dtype": torch.full((2, 3, 40), torch.nan, dtype=torch.bfloat16),
    }[alias]
    got = step(table, 2, inputs, backend, generator=ours, out=out)
    assert got is out
    assert torch.equal(got, expected.to(out.dtype))


def test_global_generator_may_be_named(generator):
    table = TABLES["ddpm"]
    inputs = make_inputs(table, (2, 20), generator, count=1)
    torch.manual_seed(3)
    got = step(table, 2, inputs, generator=torch.default_generator)
    torch.manual_seed(3)
    assert torch.equal(got, step(table, 2, inputs, noise=torch.randn(2, 20)))


def test_nothing_is_drawn_where_the_row_adds_no_noise(generator):
    for table, index in ((TABLES["ddpm"], 9), (TABLES["ddim"], 0)):
        inputs = make_inputs(table, (2, 20), generator, count=1)
        ours, untouched = generators()
        got = step(table, index, inputs, generator=ours)
        assert torch.equal(ours.get_state(), untouched.get_state())
        assert torch.equal(got, step(table, index, inputs))


def test_noise_is_not_read_where_the_row_adds_none(backend, generator):
    inputs = make_inputs(TABLES["ddpm"], (2, 20), generator, count=1)
    got = step(TABLES["ddpm"], 9, inputs, backend, noise=torch.full((2, 20), torch.nan))
    assert got.isfinite().all()


def test_device_index_draws_for_every_step(backend, generator):
    """With a tensor index the host does not know the row: noise is drawn, and the last row multiplies it by zero."""
    table = TABLES["ddpm"]
    inputs = make_inputs(table, (2, 20), generator, count=1)
    ours, theirs = generators()
    got = step(table, torch.tensor(9), inputs, backend, generator=ours)
    torch.randn(2, 20, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(got, step(table, 9, inputs, backend))
