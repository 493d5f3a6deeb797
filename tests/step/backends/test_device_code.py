"""The GPU kernel's threads on the host: they compute each element once, touch no other memory, and use vectors."""

from __future__ import annotations

import itertools
import mmap
import random

import numpy as np
import pytest
import torch

from fastguide import ROW_COLUMNS
from fastguide.step.backends import reference
from fastguide.step.noise import _normals, _philox
from tests.support import device_code
from tests.support.device_code.placed import DTYPES, STEPS, Case, rows

pytestmark = pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}")

SIZES = (1, 7, 8, 9, 127, 1021, 1023, 1024, 1025, 2053)  # around a vector and a tile, and primes
NOISES = ("none", "given", "portable", "torch")
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; older Pythons have no name for it


def drawn_case(draw: random.Random, noise: str, size: int) -> Case:
    """Draw any variant of the kernel, mostly with alignments that agree: single elements then surround vectors."""
    agree, same_dtype = draw.random() < 0.7, draw.random() < 0.5
    dtype = draw.choice(DTYPES) if same_dtype else None
    stride = draw.choice([size, size + 1, size + 4, (size + 7) // 8 * 8]) if agree else None
    return Case(
        batch=draw.choice([1, 2, 3]),
        size=size,
        noise=noise,
        count=draw.choice([0, 1, 2, 3, 5]),
        gradient=draw.random() < 0.3,
        variance=draw.random() < 0.3,
        masked=draw.random() < 0.3,
        original=draw.random() < 0.5,
        copies=draw.choice([0, 0, 1, 2]),
        in_place=draw.random() < 0.7,
        offset=draw.choice([0, 0, *range(8)]) if agree else None,
        stride=stride,
        dtype=dtype,
        indices=draw.choice(["int", "one", "per sample"]),
        scales=draw.choice(["one", "per sample", "per step", "both"]),
        threads=draw.choice([256, 512, 1024]),
        few_tiles=draw.choice([0, 1024]),
        seed=draw.randrange(2**31),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", NOISES)
def test_every_element_is_computed_once_and_nothing_else_is_touched(noise, size):
    """In place, an element that is computed twice is wrong. Vectors are used wherever they may be."""
    draw = random.Random(f"{noise} {size}")
    for number in range(30):
        case = drawn_case(draw, noise, size)
        assert case.run(order=number) == case.accesses_due(), case


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_every_variant(count, extras, noise):
    for original, copies, aligned, in_place in itertools.product((False, True), (0, 2), (False, True), (False, True)):
        size = 1032 if aligned else 1029
        for few_tiles in (0, 1024):
            layout = {"stride": size, "dtype": torch.bfloat16, "few_tiles": few_tiles}
            case = Case(2, size, noise, count, extras, extras, extras, original, copies, in_place, **layout)
            assert case.run() == case.accesses_due(), case
            first_is_aligned = noise != "torch" and copies == 0
            expected = (aligned and (noise != "torch" or case.has_torch_vectors)) or first_is_aligned
            assert (case.accesses_due() > 0) == expected, case


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("dtype", [*DTYPES, None])
def test_every_alignment(dtype, odd):
    """Tensors begin at each place in 16 bytes, and their samples at the same place or at different ones."""
    for offset, noise, copies in itertools.product(range(8), ("given", "portable"), (0, 3)):
        case = Case(3, 45, noise, 2, original=True, copies=copies, offset=offset, stride=56 + odd, dtype=dtype)
        assert case.run() == case.accesses_due(), case


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES[:2], repeat=2)), ids=str)
def test_every_pair_of_alignments(dtypes):
    """A sample and its prediction are read in vectors if some element of both is at a multiple of 16 bytes."""
    vectors = 0
    for offsets in itertools.product(range(8), repeat=2):
        case = Case(2, 45, "none")
        for name, dtype, offset in zip(("sample", "prediction 0"), dtypes, offsets, strict=True):
            case.layouts[name] = (offset, 48, dtype)
        assert case.run() == case.accesses_due(), offsets
        vectors += case.accesses_due() > 0
    assert vectors == (8 if dtypes == (torch.bfloat16, torch.bfloat16) else 16)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("size", [1024, 1029])
def test_an_index_outside_of_the_table_makes_its_sample_nan(noise, size):
    """No memory is read at the index: the last of these would lead to addresses that do not exist."""
    for scales in ("one", "both"):
        case = Case(6, size, noise, 2, True, True, False, True, 2, False, scales=scales, indices="per sample")
        case.bad_indices = {1: -1, 2: STEPS, 3: 2**63 - 1, 4: 2**40, 5: -(2**40)}
        case.run()


def test_more_tiles_than_a_launch_has_are_refused():
    """Each sample is one vector. Launches that are not refused run no block, because none is chosen."""
    x, inputs = torch.zeros(1, 8), (torch.zeros(1, len(ROW_COLUMNS)), torch.ones(1, 1, 2), 0)
    arguments = device_code.arguments_of(x, None, None, x, [], *inputs)
    launch = device_code.module().launch
    assert launch({**arguments, "batch": 2**31 - 1}, 0, []) == 0
    with pytest.raises(RuntimeError, match="more samples than one launch has blocks for"):
        launch({**arguments, "batch": 2**31}, 0, [])


def plain_tensors(size: int, address: int, stride: int, batch: int, **more: object) -> dict:
    place = (address, stride, 0)
    return {"sample": place, "out": place, "predictions": [], "batch": batch, "elements_per_sample": size, **more}


@pytest.mark.parametrize(
    ("size", "address", "stride", "tiles"),
    [
        (1, 0, 1, 2),  # one element: a tile for vectors, and one for single elements
        (1024, 4096, 1024, 1),
        (1032, 4096, 1032, 2),
        (1025, 4096, 1028, 3),  # a tail
        (1024, 4100, 1024, 2),  # heads and tails
        (2048, 4096, 2049, 3),
    ],
)
def test_tiles_of_a_launch(size, address, stride, tiles):
    for batch in (2, 65536):
        grid = device_code.module().grid(plain_tensors(size, address, stride, batch))
        assert (grid["tiles"], grid["tiles_per_sample"]) == (batch * tiles, tiles)


def test_vectors_of_a_thread():
    """Two, in launches of many tiles, of samples of more than one, and of kernels that have registers for them."""

    def vectors(batch, **more):
        grid = device_code.module().grid({**plain_tensors(2048, 4096, 2048, batch), **more})
        return grid["vectors"], grid["tiles"]

    one, two = {"predictions": [(4096, 2048, 0)]}, {"predictions": [(4096, 2048, 0)] * 2}
    for predictions in (one, two):
        assert vectors(512, **predictions) == (1, 1024)
        assert vectors(513, **predictions) == (2, 513)
    grid = device_code.module().grid(plain_tensors(1024, 4096, 1024, 2000, **two))
    assert (grid["vectors"], grid["tiles"]) == (1, 2000)
    assert vectors(513, gradient=(4096, 2048, 0), **one) == (1, 1026)
    assert vectors(513) == vectors(513, predictions=[(4096, 2048, 0)] * 3) == (1, 1026)


def test_quotients():
    """A division by a product is exact for numbers below 2^31, next to multiples above all."""
    draw = random.Random(0)
    largest = 2**31 - 1
    for divisor in (
        1,
        2,
        3,
        5,
        7,
        641,
        2**16,
        2**16 + 1,
        2**30,
        largest,
        *(draw.randrange(1, 2**31) for _ in range(300)),
    ):
        multiples = np.array([0, 1, largest // divisor, *(draw.randrange(largest // divisor + 1) for _ in range(50))])
        numbers = np.concatenate([multiples * divisor + k for k in (-1, 0, 1)] + [[largest]])
        numbers = numbers[(numbers >= 0) & (numbers <= largest)]
        assert (device_code.module().quotient(numbers.astype(np.uint32), divisor) == numbers // divisor).all(), divisor


def test_tiles_of_the_torch_stream():
    """A tile has 128 single elements; or 128 threads, each with four values of eight of torch's threads."""

    def tiles(size, batch, threads, address=4096):
        found = device_code.module().grid(plain_tensors(size, address, size, batch, threads=threads))
        return found["tiles"], found["torch_vectors"]

    assert tiles(16384, 4, 65536) == (4 * 128, False)  # all in torch's first round
    assert tiles(16384, 8, 65536) == (64, True)
    assert tiles(16384, 16, 65536) == (64, True)
    assert tiles(16384, 17, 65536) == (128, True)
    assert tiles(16384, 8, 65536, address=4100) == (8 * 128, False)
    assert tiles(16388, 8, 65536) == (8 * 129, False)
    assert tiles(8, 2**28 - 1, 65536)[1]
    assert not tiles(8, 2**28, 65536)[1]  # 2^31 elements


def sparse_memory(elements: int) -> torch.Tensor:
    """Make zeros that take no memory until they are written."""
    try:
        memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"no address space of {elements} elements: {error}")
    return torch.frombuffer(memory, dtype=torch.float32)


@pytest.mark.parametrize("noise", [None, "given", "seeds", "philox"])
@pytest.mark.parametrize("odd", [0, 5])
def test_samples_far_apart(noise, odd):
    """In every tensor, sample 2 begins 2^31 elements and 2^33 bytes behind sample 0."""
    stride, size = 2**30 + odd, 1032
    memory = sparse_memory(7 * stride)

    def at(place, batch=3):
        return memory.as_strided((batch, size), (stride, 1), place)

    generator = torch.Generator().manual_seed(0)
    tensors = {name: at(8192 * k) for k, name in enumerate(("sample", "prediction", "noise", "original"))}
    for t in tensors.values():
        t.copy_(torch.randn(3, size, generator=generator))
    staged = at(2**20, 6)
    more = {"given": {"noise": tensors["noise"]}, "seeds": {"seeds": torch.tensor([1, 2, 3])}, None: {}}
    more |= {"philox": {"philox": torch.tensor([1, 0]), "philox_threads": 256}}
    near = {name: t.clone() for name, t in tensors.items()}

    def step(tensors, staged, noise):
        arguments = [tensors["sample"], tensors["original"], staged, tensors["sample"], [tensors["prediction"]]]
        named = {"gradient": None, "variance": None, "noise": None, "seeds": None, "philox": None, "philox_threads": 0}
        named |= {**more[noise], **({"noise": tensors["noise"]} if noise == "given" else {})}
        device_code.guided_step(*arguments, rows(), torch.tensor([[[1.0, 0.0]]]), 1, None, *named.values())

    step(tensors, staged, noise)
    near_staged = torch.empty(6, size)
    step(near, near_staged, noise)
    assert torch.equal(staged, near_staged)
    for name, t in tensors.items():
        assert torch.equal(t, near[name])
        for sample in range(3):
            begin = t[sample].storage_offset()
            assert not memory[max(begin - 64, 0) : begin].any()
            assert not memory[begin + size : begin + size + 64].any()


@pytest.mark.parametrize("noise", [None, "given", "seeds", "channels"])
def test_the_end_of_a_sample_beyond_32_bits(noise):
    """Only its last tiles run: they find their elements, and count them for the noise."""
    size, end = 2**31 + 2**11 + 8, 4096
    sample, prediction = (sparse_memory(size).view(1, -1) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for t in (sample, prediction):
        t[:, -end:] = torch.randn(end, generator=generator)
    seeds = torch.tensor(9) if noise in ("seeds", "channels") else None
    given = prediction if noise == "given" else None
    inputs = [rows(), torch.tensor([[[1.0, 0.0]]]), 1, None, None, None]
    expected = torch.empty(1, end)
    place = torch.arange(size - end, size)
    if noise == "channels":
        place = place % 8 * (size // 8) + place // 8
    z = None if seeds is None else portable_values(9, 1, place)
    z = prediction[:, -end:] if noise == "given" else z
    reference.guided_step(expected, None, None, sample[:, -end:], [prediction[:, -end:]], *inputs, z)
    before = sample[:, -end:].clone()
    plain = device_code.arguments_of(sample, None, None, sample, [prediction], *inputs, given, seeds)
    plain["channels"] = 8 if noise == "channels" else 1
    tile = 2 * 1024  # a thread has two vectors
    last = size // tile
    assert device_code.module().grid(plain)["tiles"] == last + 1
    device_code.module().launch(plain, 1, [last - 1, last])
    got, first = sample[:, -end:], last * tile - tile - (size - end)
    assert torch.equal(got[:, first:], expected[:, first:])
    assert torch.equal(got[:, :first], before[:, :first])


def portable_values(seed: int, step: int, places: torch.Tensor) -> torch.Tensor:
    """Compute the portable stream from its parts, for elements that portable_noise would take hours to reach."""
    block = places // 4
    key = torch.full_like(block, seed), torch.zeros_like(block)
    words = _philox((block & 0xFFFFFFFF, block >> 32, torch.full_like(block, step), torch.zeros_like(block)), key)
    values = torch.stack((*_normals(words[0], words[1]), *_normals(words[2], words[3])), -1)
    return values.gather(1, (places % 4)[:, None]).T


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (1, "the library has no code for this GPU"),
        (2, "has no code"),
        (3, "the driver is older than the CUDA runtime"),
        (4, "another error"),
    ],
)
def test_a_launch_that_fails_says_why(error, message):
    """CUDA returns errors 1 and 2 on an architecture that the library was not compiled for."""
    x = torch.zeros(1, 9)
    inputs = [rows(), torch.tensor([[[1.0, 0.0]]]), 1, None, None, None]
    device_code.module().refuse(error)
    try:
        with pytest.raises(RuntimeError, match=message):
            device_code.guided_step(torch.empty_like(x), None, None, x, [x], *inputs)
    finally:
        device_code.module().refuse(0)


def test_a_launch_may_load_code_within_a_capture_and_leaves_its_mode():
    """The stand-in refuses launches in any other mode, as CUDA does with the first launch of a kernel."""
    x, inputs = torch.zeros(1, 8), (torch.zeros(1, len(ROW_COLUMNS)), torch.ones(1, 1, 2), 0)
    for _ in range(2):
        device_code.guided_step(torch.empty_like(x), None, None, x, [x], *inputs)
        assert device_code.module().captures_globally()


@pytest.mark.parametrize(("driver", "too_old"), [(0, False), (12090, True), (13000, False), (14010, False)])
def test_a_driver_is_too_old_if_its_cuda_is_of_an_earlier_generation(driver, too_old):
    """The tests' runtime is CUDA 13.0: a driver of any minor version of 13 serves it."""
    assert device_code.module().driver_too_old(driver) is too_old
