"""The portable stream, bit by bit: Philox, what is counted, normal values, and the same bits from every kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastguide
from fastguide import portable_noise
from fastguide.step import noise
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.operator import StepArguments
from tests.support.cases import DTYPES, TABLES
from tests.support.pure_noise import TABLE, drawn
from tests.support.step_inputs import guided_step, make_inputs

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SIZES = [  # of one sample, each with what it is there for
    ((1,), "one value of a call"),
    ((3,), "less than one call"),
    ((7, 11), "no multiple of a call's four values"),
    ((511,), "below one block"),
    ((513,), "one element beyond a block"),
    ((3, 37, 41), "many blocks, and a tail"),
    ((32769,), "threads that begin inside a sample, one element beyond a grain"),
    ((2, 191, 173), "threads that begin between a call's values"),
]
SIZE_IDS = [case for _, case in SIZES]
ODD_SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -77]


def words(text):
    return [int(word, 16) for word in text.split()]


def python_philox(counter, key):
    """Salmon et al. 2011, in the integers of Python."""
    x, y, z, w = counter
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (q >> 32) ^ y ^ k0, q % 2**32, (p >> 32) ^ w ^ k1, p % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x, y, z, w


def mapped_noise(seed, step, elements):
    """The whole mapping once more, in float64 but for the uniform number, which is rounded to float32."""
    seed, step = seed % 2**64, step % 2**32
    values = []
    for element in elements:
        block = element // 4
        r = python_philox((block % 2**32, block >> 32, step, 0), (seed % 2**32, seed >> 32))
        a, b = r[:2] if element % 4 < 2 else r[2:]
        u = np.float64(np.float32(a) * np.float32(2.0**-32) + np.float32(2.0**-33))
        turn = np.cos if element % 2 == 0 else np.sin
        values.append(np.sqrt(-2 * np.log(u)) * turn(2 * np.pi * b / 2**32))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, result):
    counter, key, result = words(counter), words(key), words(result)
    assert list(python_philox(counter, key)) == result
    ours = noise._philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in ours] == result


def test_philox_is_the_independent_one_at_random():
    drawn_words = torch.randint(2**32, (6, 200), generator=torch.Generator().manual_seed(0))
    ours = torch.stack(noise._philox(tuple(drawn_words[:4]), tuple(drawn_words[4:])))
    theirs = [python_philox(column[:4], column[4:]) for column in drawn_words.T.tolist()]
    assert torch.equal(ours.T, torch.tensor(theirs))


@pytest.mark.parametrize("step", [0, 1, 39, noise.STARTING_NOISE, 2**31 + 5])
@pytest.mark.parametrize("seed", ODD_SEEDS)
def test_seed_step_and_element_are_mapped_as_specified(seed, step):
    got = portable_noise([seed], (1, 1, 1001), step=step).flatten().double()
    torch.testing.assert_close(got, mapped_noise(seed, step, range(1001)), rtol=0, atol=1e-6)


def test_words_beyond_32_bits_of_the_block_are_counted():
    """No tensor is as large here; the words that portable_noise would hand on are."""
    block = torch.tensor([2**32 - 1, 2**32, 2**35 + 3])
    zero = torch.zeros_like(block)
    got = noise._philox((block & 0xFFFFFFFF, block >> 32, zero + 7, zero), (zero + 5, zero))
    expected = [python_philox((b % 2**32, b >> 32, 7, 0), (5, 0)) for b in block.tolist()]
    assert torch.equal(torch.stack(got, 1), torch.tensor(expected))


@pytest.mark.parametrize(
    "b", [0, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31, 5 * 2**29, 3 * 2**30, 7 * 2**29, 2**32 - 1]
)
def test_angles_at_the_ends_of_the_eighths(b):
    a = 0x9E3779B9
    first, second = noise._normals(torch.tensor([a]), torch.tensor([b]))
    radius = np.sqrt(-2 * np.log(np.float64(np.float32(a) * np.float32(2.0**-32) + np.float32(2.0**-33))))
    expected = radius * np.exp(2j * np.pi * b / 2**32)
    assert abs(first.item() - expected.real) < 1e-6
    assert abs(second.item() - expected.imag) < 1e-6


@pytest.mark.parametrize(
    ("a", "radius"), [(0, np.sqrt(66 * np.log(2))), (1, np.sqrt(-2 * np.log(1.5 / 2**32))), (2**32 - 1, 0.0)]
)
def test_the_ends_of_the_uniform_number_are_finite(a, radius):
    """The farthest value is 6.76; zero is reached where float32 rounds the uniform number to 1."""
    first, second = noise._normals(torch.tensor([a]), torch.tensor([0]))
    assert abs(first.item() - radius) < 2e-6
    assert abs(second.item()) < 1e-6


@pytest.mark.parametrize(("size", "case"), SIZES, ids=SIZE_IDS)
def test_kernels_draw_the_bits_of_portable_noise(backend, size, case):
    seeds, index = torch.tensor([-77, 2**62 + 3]), torch.tensor([7, 39])
    assert torch.equal(drawn(seeds, (2, *size), index, backend=backend), portable_noise(seeds, (2, *size), step=index))


def test_seeds_and_steps_for_all_and_for_each(backend):
    shape = (len(ODD_SEEDS), 3, 37)
    seeds, index = torch.tensor(ODD_SEEDS), torch.tensor([0, 1, 39, 7, 7, 2, 0])
    for s, i in ((seeds, index), (seeds, 5), (seeds[5], index), (seeds[4], torch.tensor(39)), (seeds, index[2])):
        assert torch.equal(drawn(s, shape, i, backend=backend), portable_noise(s, shape, step=i))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_adds_the_same_float32_values(backend, dtype):
    shape, seeds = (3, 5, 131), [4, -4, 2**40]
    got = drawn(seeds, shape, 3, sample=torch.zeros(shape, dtype=dtype), backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, portable_noise(seeds, shape, step=3, dtype=dtype))
    assert torch.equal(got, portable_noise(seeds, shape, step=3).to(dtype))


@pytest.mark.parametrize("name", ["ddpm", "ddpm learned", "ddim noisy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds_are_the_step_with_that_noise(backend, name, dtype, generator):
    """Among gradients, clips and variances too; the noise stays in float32, whatever the sample's dtype."""
    table, shape = TABLES[name], (3, 5, 131)
    i = make_inputs(table, shape, generator, count=3, gradient=True, dtype=dtype)
    guidance = fastguide.Composed([2.0, 3.0]) + fastguide.Classifier()
    seeds, index = torch.tensor([8, 9, -1]), torch.tensor([0, 4, 9])

    def step(**noise):
        return guided_step(
            table,
            index,
            i.sample,
            i.predictions,
            guidance,
            gradient=i.gradient,
            variance=i.variance,
            return_original=True,
            backend=backend,
            **noise,
        )

    expected = step(noise=portable_noise(seeds, shape, step=index))
    for got, want in zip(step(seeds=seeds), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "shape", [(3, 4, 9, 5), (2, 3, 64, 65), (2, 1, 9, 5), (2, 3, 1, 7), (2, 3, 4, 5, 6), (3, 5, 7)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_counts_in_the_logical_order(backend, dtype, shape):
    """Any number of dimensions: in memory the channels lie innermost, but the values are those of contiguous."""
    sample = torch.zeros(shape, dtype=dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    seeds = torch.arange(shape[0])
    got = drawn(seeds, shape, 2, sample=sample, backend=backend)
    assert got.stride() == sample.stride()
    assert torch.equal(got, portable_noise(seeds, shape, step=2, dtype=dtype))


def test_batch_stride_changes_nothing(backend):
    """The sample, the output, the seeds and the indices may each be a view with gaps, or an expanded one."""
    shape = (4, 3, 67)
    seeds, index = torch.arange(10, 18), torch.arange(8)
    expected = portable_noise(seeds[::2], shape, step=index[::2])
    buffer = torch.full((4, 5, 67), torch.nan)
    got = drawn(
        seeds[::2], shape, index[::2], sample=torch.zeros(4, 6, 67)[:, 1:4], out=buffer[:, 1:4], backend=backend
    )
    assert torch.equal(got, expected)
    assert buffer[:, 0].isnan().all()
    assert buffer[:, 4].isnan().all()
    one = torch.tensor(10).expand(4)
    got = drawn(one, shape, torch.tensor(0).expand(4), sample=torch.zeros(1, 3, 67).expand(shape), backend=backend)
    assert torch.equal(got, expected[:1].expand(shape))


def test_a_sample_draws_the_same_alone_and_in_any_batch(backend):
    seeds, index = torch.tensor([3, 9, 2**50, -6, 11]), torch.tensor([4, 4, 0, 39, 17])
    together = drawn(seeds, (5, 700), index, backend=backend)
    for b in range(5):
        assert torch.equal(drawn(seeds[b], (1, 700), int(index[b]), backend=backend), together[b : b + 1])
    for order in ([4, 3, 2, 1, 0], [2, 2, 0], [1, 4]):
        some = drawn(seeds[order], (len(order), 700), index[order], backend=backend)
        assert torch.equal(some, together[order])
        assert torch.equal(portable_noise(seeds[order], (len(order), 700), step=index[order]), together[order])


def test_a_shorter_sample_is_the_beginning_of_a_longer_one():
    """The element alone is counted, not the shape."""
    long = portable_noise([1, 2], (2, 5, 40))
    assert torch.equal(portable_noise([1, 2], (2, 33)), long.flatten(1)[:, :33])


def test_every_step_draws_anew(backend):
    draws = torch.cat([drawn([5], (1, 50), k, backend=backend) for k in range(len(TABLE))])
    assert torch.equal(draws, torch.cat([portable_noise([5], (1, 50), step=k) for k in range(len(TABLE))]))
    start = portable_noise([5], (1, 50))
    assert torch.equal(start, portable_noise([5], (1, 50), step=noise.STARTING_NOISE))
    assert len(torch.cat([draws, start]).unique()) == 50 * (len(TABLE) + 1)


def test_seeds_of_64_bits_are_the_signed_ones():
    for seed in (2**64 - 1, 2**63, 2**63 + 12345):
        assert torch.equal(portable_noise(seed, (2, 9)), portable_noise(seed - 2**64, (2, 9)))
        assert torch.equal(portable_noise([seed, 0], (2, 9))[:1], portable_noise([seed - 2**64], (1, 9)))
    halves = portable_noise([1, 2**32, 1 + 2**32], (3, 400))
    assert len(halves.unique()) == 3 * 400


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 5)])
def test_no_samples_and_no_elements(backend, shape):
    seeds = torch.arange(shape[0])
    assert portable_noise(seeds, shape).shape == shape
    for index in (3, torch.zeros(shape[0], dtype=torch.int64)):
        assert drawn(seeds, shape, index, backend=backend).shape == shape


@pytest.mark.parametrize(("name", "index"), [("ddpm", 9), ("ddim", 0)])
def test_a_row_without_noise_draws_nothing(name, index, generator, monkeypatch):
    """The kernel is not even given the seeds; where the host does not know the row, it multiplies by zero."""
    table, given = TABLES[name], []

    def step(*arguments):
        given.append(StepArguments(*arguments).seeds)
        return reference.step(*arguments)

    reference = BACKENDS["reference"]
    monkeypatch.setitem(BACKENDS, "reference", reference._replace(step=step))
    i, seeds = make_inputs(table, (2, 20), generator, count=1), torch.tensor([1, 2])
    plain = guided_step(table, index, i.sample, i.predictions, backend="reference")
    for k in (index, torch.tensor(index)):
        got = guided_step(table, k, i.sample, i.predictions, seeds=seeds, backend="reference")
        assert torch.equal(got, plain)
    assert given[:2] == [None, None]
    assert (given[2] is None) == (not table.adds_noise_anywhere)
