"""The noise of the GPU's code on the host: torch's CUDA stream against torch's kernel in a loop, and the portable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastguide import portable_noise
from tests.support import device_code
from tests.support.device_code.placed import STEPS, rows
from tests.support.pure_noise import TABLE
from tests.support.torch_randn import UNROLL, WORD, literal_normals, philox4x32_10, torch_kernel

pytestmark = pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}")

OFFSETS = [0, 4, 2**32 + 8, 2**34 - 4, 2**34 + 12, 2**40]  # the counter's upper word begins at 2^34
SEEDS = [0, 1234, 2**63 + 5, 2**64 - 1]


def drawn(sample: torch.Tensor, philox: torch.Tensor | None, threads: int, seeds=None, index=0, order=1, **options):
    """Make a step whose output is its noise; return it and the number of 16-byte accesses."""
    out = torch.empty_strided(sample.shape, sample.stride(), dtype=options.get("dtype", sample.dtype)).fill_(torch.nan)
    inputs = [TABLE.device_rows(None, torch.float32), torch.tensor([[[1.0, 0.0]]]), index]
    accesses = device_code.guided_step(
        out, None, None, sample, [], *inputs, None, None, None, None, seeds, philox, threads, order=order
    )
    return out, accesses


def test_philox_gives_its_known_answers():
    """The answers are Random123's kat_vectors."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    for counter, key, answer in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (*pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert philox4x32_10(counter, key) == answer
        key64 = np.uint64(key[0] + (key[1] << 32))
        assert device_code.module().philox(*map(np.uint32, counter), key64, np.arange(4)).tolist() == answer


@pytest.mark.parametrize("threads", [256, 512, 1024])
@pytest.mark.parametrize(
    "size", ["one round", "a value less", "a value more", "three rounds", "a call and a part", "calls"]
)
def test_torch_deals_out_these_integers(size, threads):
    numel = {
        "one round": threads,
        "a value less": threads - 1,
        "a value more": threads + 1,
        "three rounds": 3 * threads,
    }
    numel = (numel | {"a call and a part": 4 * threads + 77, "calls": 10 * threads - 3})[size]
    module = device_code.module()
    for seed, offset in zip(SEEDS, OFFSETS, strict=False):
        elements = np.arange(numel, dtype=np.uint64)
        words = [module.torch_word(np.uint64(seed), np.uint64(offset), elements, threads, i) for i in range(2)]
        got = np.stack([*words, module.torch_value_is_second(elements, threads)], 1)
        assert got.tolist() == [list(x) for x in torch_kernel(numel, seed, offset, threads)]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(
    ("shape", "threads", "vectors"),
    [
        ((3, 40), 256, False),  # below one round of torch's grid
        ((2, 1000), 512, True),
        ((3, 5, 257), 512, False),  # odd samples
        ((1, 5112), 512, True),  # ends within the tenth round
        ((4, 3, 16, 16), 256, True),  # a whole number of calls
    ],
)
def test_a_step_draws_what_torch_s_kernel_draws(shape, threads, vectors, offset):
    """Single elements and vectors do; seed and offset on the host give the same bits as a state on the device."""
    sample = torch.zeros(shape)
    for seed in SEEDS:
        signed = seed - 2**64 if seed >= 2**63 else seed
        got, accesses = drawn(sample, torch.tensor([signed, offset]), threads)
        assert accesses == (sample.numel() // 8 * 4 if vectors else 0)
        truth = literal_normals(sample.numel(), seed, offset, threads)
        assert (got.flatten().double() - truth).abs().max() < 2e-6
        state = torch.tensor([signed, offset, 0])
        from_state, _ = drawn(sample, state, threads, order=2)
        assert torch.equal(from_state, got)
        increment = device_code.module().torch_increment(np.uint64(sample.numel()), threads)
        assert state.tolist() == [signed, offset + increment, 0]


def test_vectors_and_single_elements_are_the_same_bits():
    philox = torch.tensor([3, 8])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        vectors, accesses = drawn(torch.zeros(2, 2000, dtype=dtype), philox, 512)
        assert accesses > 0
        single, accesses = drawn(torch.zeros(2, 2001, dtype=dtype)[:, :2000], philox, 512)
        assert accesses == 0
        elements = np.arange(4000, dtype=np.uint64)
        expected = torch.from_numpy(device_code.module().torch_normal(np.uint64(3), np.uint64(8), elements, 512))
        assert torch.equal(vectors, single)
        assert torch.equal(vectors.flatten(), expected.to(dtype))


def test_noise_is_rounded_as_the_sample_s_dtype():
    """torch.randn of that dtype is rounded so, whatever the output's dtype, within torch's grid and beyond."""
    for threads in (512, 8192):
        for dtype in (torch.bfloat16, torch.float16):
            wide, _ = drawn(torch.zeros(2, 2000, dtype=dtype), torch.tensor([3, 8]), threads, dtype=torch.float32)
            full, _ = drawn(torch.zeros(2, 2000), torch.tensor([3, 8]), threads)
            assert torch.equal(wide, full.to(dtype).float())
            assert not torch.equal(wide, full)


@pytest.mark.parametrize("threads", [256, 4096])
def test_torch_s_stream_counts_channels_last_as_contiguous(threads):
    """The values are those of torch.randn(shape), which is contiguous, whatever the layout of the sample."""
    sample, philox = torch.zeros(2, 3, 8, 16), torch.tensor([3, 8])
    expected, _ = drawn(sample, philox, threads)
    got, accesses = drawn(sample.contiguous(memory_format=torch.channels_last), philox, threads)
    assert torch.equal(got, expected)
    assert got.stride() != expected.stride()
    assert accesses == 0


def test_torch_s_first_values():
    """The values are what torch.manual_seed(0); torch.randn(8, device="cuda") prints."""
    printed = torch.tensor([-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284])
    got, _ = drawn(torch.zeros(1, 8), torch.tensor([0, 0]), 256)
    assert (got - printed).abs().max() < 1e-4


def test_the_increment_is_torch_s():
    """torch's calc_execution_policy counts the calls of the busiest thread, times four."""
    for threads in (256, 512, 270_336):
        for numel in (1, threads - 1, threads, 4 * threads, 4 * threads + 1, 9 * threads, 2**33 + 1):
            calls = (numel - 1) // (threads * UNROLL) + 1
            assert device_code.module().torch_increment(np.uint64(numel), threads) == 4 * calls
    assert device_code.module().torch_increment(np.uint64(0), 256) == 0


def test_threads_have_shared_memory_of_their_own():
    sample = torch.zeros(2, 2000)
    inputs = [TABLE.device_rows(None, torch.float32), torch.tensor([[[1.0, 0.0]]]), 0, *[None] * 5]
    plain = device_code.arguments_of(sample, None, None, sample, [sample], *inputs, torch.tensor([3, 8]), 512)
    for thread in range(64):
        assert device_code.module().shared_of_thread(plain, 0, thread) == list(range(thread, 4 * 8 * 128, 128))


def test_a_row_and_weights_of_each_sample_reach_torch_s_vectors():
    """A vector's four values may be of four samples."""
    batch, size, threads = 5, 256, 256
    indices = torch.tensor([2, 0, 1, 1, 0])
    sample = torch.ones(batch, size)
    philox = torch.tensor([3, 8])
    arguments = [rows(), torch.arange(2.0 * STEPS * batch).view(STEPS, batch, 2), 0, indices, *[None] * 4]
    whole, one_by_one = torch.empty(batch, size), []
    assert device_code.guided_step(whole, None, None, sample, [sample], *arguments, philox, threads) > 0
    noise = torch.from_numpy(device_code.module().torch_normal(3, 8, np.arange(batch * size, dtype=np.uint64), threads))
    for b in range(batch):
        out = torch.empty(1, size)
        alone = [rows(), arguments[1][:, b : b + 1].contiguous(), int(indices[b]), None, None, None]
        z = noise.view(batch, 1, size)[b].contiguous()
        device_code.guided_step(out, None, None, sample[:1], [sample[:1]], *alone, z)
        one_by_one.append(out)
    assert torch.equal(whole, torch.cat(one_by_one))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1024), (2, 3, 341), (2, 4, 16, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_portable_stream_is_portable_noise(shape, dtype):
    seeds = [-5, 2**63 - 1, 9][: shape[0]]
    for index in (0, 17):
        for given in (torch.tensor(seeds), torch.tensor(seeds[0])):
            got, accesses = drawn(torch.zeros(shape, dtype=dtype), None, 0, given, index)
            assert torch.equal(got, portable_noise(given, shape, step=index, dtype=dtype))
            assert (accesses > 0) == (shape[-1] >= 8)


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 8, 16])
def test_the_portable_stream_counts_channels_last_as_contiguous(channels):
    """A vector's elements are of several channels, or of several places of few channels, or both."""
    for places in (128, 127):
        sample = torch.zeros(2, channels, 1, places).contiguous(memory_format=torch.channels_last)
        got, accesses = drawn(sample, None, 0, torch.tensor([4, 5]))
        assert torch.equal(got, portable_noise([4, 5], sample.shape, step=0))
        assert got.stride() == sample.stride()
        size = channels * places
        first = [-(k * size) % 4 for k in range(2)]  # the first element of a sample at a multiple of 16 bytes
        assert accesses == 4 * sum((size - begin) // 8 for begin in first)


def test_one_portable_value_is_that_of_its_vector():
    module, blocks = device_code.module(), np.arange(2**32 - 3, 2**32 + 3, dtype=np.uint64)
    for i in range(4):
        vector = module.portable_normal(np.uint64(2**64 - 3), 2**32 - 1, blocks, i)
        assert np.array_equal(vector, module.portable_normal_of(np.uint64(2**64 - 3), 2**32 - 1, 4 * blocks + i))


def test_counted_place_is_a_transposition():
    places = np.arange(7 * 15)
    assert np.array_equal(device_code.module().counted_place(places, 1, 105), places)
    by_memory = torch.arange(105).view(7, 15).T.contiguous().flatten()  # logical order, stored with channels innermost
    assert device_code.module().counted_place(places, 7, 105).tolist() == by_memory.tolist()
