"""The PTX interpreter: its arithmetic against libm and Python's integers, its checks by kernels of a few lines."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import random

import numpy as np
import pytest
import torch

from tests.support.ptx import arithmetic
from tests.support.ptx.generate import code_of
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import INITIALISED, READ, WRITE, Memory
from tests.support.ptx.parse import Module, PtxError
from tests.support.ptx.races import races

# ---- Arithmetic ----

ROUNDING = {  # of fesetround: to nearest, down, up, to zero
    "x86_64": {"rn": 0, "rm": 0x400, "rp": 0x800, "rz": 0xC00},
    "aarch64": {"rn": 0, "rm": 0x800000, "rp": 0x400000, "rz": 0xC00000},
}


def triples(count: int) -> list[tuple[np.ndarray, ...]]:
    """Draw any bits, common values, sums that nearly cancel, that are subnormal, and that are 0."""
    generator = np.random.default_rng(0)
    any_bits = generator.integers(0, 2**32, (3, count), dtype=np.uint64).astype(np.uint32).view(np.float32)
    common = generator.standard_normal((3, count)).astype(np.float32)
    a, b, c = common
    tiny = np.float32(1e-22)
    nearly = -(a * b) + np.float32(1e-9) * c
    found = [tuple(any_bits), (a, b, c), (a, b, -(a * b)), (a, b, nearly)]
    return [*found, (a * tiny, b * tiny, c * np.float32(1e-44)), (np.rint(a), np.rint(b), -(np.rint(a) * np.rint(b)))]


@pytest.mark.skipif(platform.machine() not in ROUNDING, reason="the rounding modes' numbers are not known")
@pytest.mark.parametrize("mode", ["rn", "rm", "rp", "rz"])
def test_fma_is_that_of_libm(mode):
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    with np.errstate(all="ignore"):
        for a, b, c in triples(4000):
            got = arithmetic.fma(a, b, c, mode)
            libm.fesetround(ROUNDING[platform.machine()][mode])
            values = [libm.fmaf(*numbers) for numbers in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
            libm.fesetround(0)
            want = np.array(values, np.float32)
            same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
            assert same.all(), (a[~same][0], b[~same][0], c[~same][0], got[~same][0], want[~same][0])


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def word(value: int, dtype: type = np.uint32) -> np.ndarray:
    return np.array([value], np.uint64).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def test_products_shifts_and_quotients():
    draw = random.Random(0)
    for _ in range(500):
        a, b, amount = draw.getrandbits(64), draw.getrandbits(draw.choice([1, 8, 31, 64])), draw.randrange(70)
        low, other = a % 2**32, b % 2**32
        assert arithmetic.product_high(word(low), word(other), np.uint32)[0] == low * other >> 32
        assert arithmetic.product_high(word(a, np.uint64), word(b, np.uint64), np.uint64)[0] == a * b >> 64
        for dtype, bits in ((np.int32, 32), (np.int64, 64)):
            x, y = word(a % 2**bits, dtype), word(b % 2**bits, dtype)
            p, q = signed(a % 2**bits, bits), signed(b % 2**bits, bits)
            assert arithmetic.product_high(x, y, dtype)[0] == p * q >> bits
            assert arithmetic.shifted_right(x, np.uint32(amount), dtype)[0] == p >> amount
            if q:
                toward_zero = abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)
                assert arithmetic.quotient(x, y, dtype)[0] == signed(toward_zero % 2**bits, bits)
                assert arithmetic.remainder(x, y, dtype)[0] == p - toward_zero * q
        assert arithmetic.shifted_left(word(low), np.uint32(amount), np.uint32)[0] == (low << amount) % 2**32
        assert arithmetic.shifted_right(word(low), np.uint32(amount), np.uint32)[0] == low >> amount
        both, turn = other << 32 | low, amount % 32
        assert arithmetic.funnel_shifted(word(low), word(other), np.uint32(amount), True)[0] == both << turn >> 32 & (
            2**32 - 1
        )
        assert arithmetic.funnel_shifted(word(low), word(other), np.uint32(amount), False)[0] == both >> turn & (
            2**32 - 1
        )
    assert arithmetic.quotient(word(7), word(0), np.uint32)[0] == 2**32 - 1


def test_bits():
    draw = random.Random(1)
    for _ in range(500):
        a, b, c = (draw.getrandbits(32) for _ in range(3))
        table, begin, length = draw.randrange(256), draw.randrange(40), draw.randrange(40)
        index = [(a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1) for k in range(32)]
        want = sum((table >> i & 1) << k for k, i in enumerate(index))
        assert arithmetic.looked_up(word(a), word(b), word(c), table)[0] == want

        field = [a >> min(begin + k, 31) & 1 if begin + k < 32 else a >> 31 for k in range(min(length, 32))]
        sign = a >> min(begin + length - 1, 31) & 1 if length else 0
        want = sum(bit << k for k, bit in enumerate(field + [sign] * (32 - len(field))))
        got = arithmetic.extracted_bits(word(a, np.int32), np.uint32(begin), np.uint32(length), np.int32)
        assert got.view(np.uint32)[0] == want
        mask = (1 << min(length, 32)) - 1
        assert (
            arithmetic.extracted_bits(word(a), np.uint32(begin), np.uint32(length), np.uint32)[0] == a >> begin & mask
        )
        place = (mask << begin) % 2**32
        want = ((a << begin) & place) | (b & ~place)
        assert arithmetic.inserted_bits(word(a), word(b), np.uint32(begin), np.uint32(length), np.uint32)[0] == want

        bytes_ = (b << 32 | a).to_bytes(8, "little")
        picked = [(bytes_[c >> 4 * k & 7], c >> 4 * k & 8) for k in range(4)]
        want = int.from_bytes([(0xFF if byte >> 7 else 0) if as_sign else byte for byte, as_sign in picked], "little")
        assert arithmetic.permuted_bytes(word(a), word(b), word(c))[0] == want


def test_conversions_are_those_of_torch():
    drawn = triples(20000)[0][0].view(np.uint32)
    halves = [drawn >> n << n | 1 << n - 1 for n in (16, 13)]  # between two values of bfloat16, and of float16
    bits = np.concatenate([drawn, *halves]).astype(np.uint32).view(np.float32)
    values = torch.from_numpy(bits)
    with np.errstate(all="ignore"):
        for dtype, to, back in (
            (torch.bfloat16, arithmetic.to_bfloat16, arithmetic.from_bfloat16),
            (torch.float16, arithmetic.to_float16, arithmetic.from_float16),
        ):
            want = values.to(dtype)
            numbers = ~want.isnan().numpy()
            got = to(bits)
            assert np.array_equal(got[numbers], want.view(torch.int16).numpy().view(np.uint16)[numbers])
            assert np.array_equal(np.isnan(back(got)), ~numbers)
            assert np.array_equal(back(got)[numbers], want.float().numpy()[numbers])
        some = np.array([2.5, -2.5, 3.5, 3e38, -3e38, np.nan], np.float32)
        for mode, want in {"rni": [2, -2, 4], "rzi": [2, -2, 3], "rmi": [2, -3, 3], "rpi": [3, -2, 4]}.items():
            got = arithmetic.float_to_integer(some, np.int32, mode).tolist()
            assert got == [*want, 2**31 - 1, -(2**31), 0]
        assert arithmetic.float_to_integer(some, np.int64, "rzi").tolist()[3:] == [2**63 - 1, -(2**63), -(2**63)]


def test_least_and_greatest():
    a = np.array([1, np.nan, 0.0, -0.0, np.nan], np.float32)
    b = np.array([2, 3, -0.0, 0.0, np.nan], np.float32)
    assert str(arithmetic.float_minimum(a, b).tolist()) == "[1.0, 3.0, -0.0, -0.0, nan]"
    assert str(arithmetic.float_maximum(a, b).tolist()) == "[2.0, 3.0, 0.0, 0.0, nan]"
    assert str(arithmetic.nan_minimum(a, b).tolist()) == "[1.0, nan, -0.0, -0.0, nan]"
    assert str(arithmetic.nan_maximum(a, b).tolist()) == "[2.0, nan, 0.0, 0.0, nan]"


# ---- Kernels of a few lines: two blocks of 64 threads, and 64 words of memory ----

TEXT = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0) .maxntid 64, 1, 1
{
.reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<12>; .reg .f32 %f<4>; .reg .b64 %rd<6>;
.shared .align 4 .b8 words[256];
ld.param.u64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
BODY
ret;
}
"""
FIRST_BLOCK = "setp.ne.s32 %p1, %r2, 0; @%p1 ret;"


def run(
    body: str, flags: int = READ | WRITE | INITIALISED, classes: int = 1, blocks: int = 2
) -> tuple[list[str], list[int]]:
    """Return what was wrong, and the words."""
    memory = Memory(1 << 16)
    place = memory.allocate(256, "words")
    memory.allow(place, 256, flags)
    code = code_of(Module(TEXT.replace("BODY", body)), "kernel")
    launch = Launch(memory, code, blocks, 64, (memory.base + place).to_bytes(8, "little")).run(classes=classes)
    return launch.findings + races(launch), memory.bytes[place : place + 256].view(np.uint32).tolist()


def test_threads_write_their_own_words():
    assert run(FIRST_BLOCK + "st.global.u32 [%rd3], %r1;") == ([], list(range(64)))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("st.global.u32 [%rd3+4], %r1;", "out of bounds, write: 4 bytes at words at byte 256 of 256"),
        ("st.global.u32 [%rd3+-4], %r1;", "out of bounds, write"),
        ("ld.global.u32 %r3, [%rd3+4];", "out of bounds, read"),
        ("st.global.u32 [%rd3+2], %r1;", "misaligned, write"),
        ("ld.global.u64 %rd4, [%rd3];", "misaligned, read"),
        ("ld.global.u32 %r3, [%rd2];", "out of bounds, read: 4 bytes at address"),
        ("ld.param.u64 %rd4, [kernel_param_0+8];", "parameters"),
        ("mov.u32 %r3, words; st.shared.u32 [%r3+256], %r1;", "shared memory: 4 bytes at byte 256 of 256"),
        ("mov.u32 %r3, words; st.shared.u32 [%r3+2], %r1;", "shared memory: 4 bytes at byte 2 of 256"),
        ("mov.u32 %r3, words; ld.shared.u32 %r4, [%r3];", "not initialised"),
    ],
)
def test_accesses_that_are_refused(body, found):
    wrong, _ = run(FIRST_BLOCK + body)
    assert found in wrong[0]


def test_memory_that_was_not_written_or_may_not_be():
    assert "not initialised, read" in run(FIRST_BLOCK + "ld.global.u32 %r3, [%rd3];", READ | WRITE)[0][0]
    assert run(FIRST_BLOCK + "st.global.u32 [%rd3], 1; ld.global.u32 %r3, [%rd3];", READ | WRITE)[0] == []
    assert "out of bounds, write" in run(FIRST_BLOCK + "st.global.u32 [%rd3], %r1;", READ | INITIALISED)[0][0]
    assert "out of bounds, read" in run(FIRST_BLOCK + "ld.global.u32 %r3, [%rd3];", WRITE)[0][0]


SWAP = "mov.u32 %r3, words; shl.b32 %r4, %r1, 2; add.s32 %r4, %r4, %r3; xor.b32 %r5, %r4, 4; st.shared.u32 [%r4], %r1;"


@pytest.mark.parametrize(
    ("between", "raced"),
    [
        ("", True),
        ("bar.sync 0;", False),
        ("barrier.sync 0;", False),
        ("bar.warp.sync -1;", False),
        ("membar.gl;", True),
    ],
)
def test_races_in_shared_memory(between, raced):
    wrong, words = run(f"{FIRST_BLOCK}{SWAP}{between} ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd3], %r6;")
    assert words == [k ^ 1 for k in range(64)]
    assert any("shared memory of block 0" in text for text in wrong) == raced
    assert bool(wrong) == raced


def test_a_warp_is_not_a_block():
    """Threads of different warps are ordered by a barrier of the block, and by none of warps."""
    far = SWAP.replace("%r4, 4;", "%r4, 128;")
    assert "race" in run(f"{far} bar.warp.sync -1; ld.shared.u32 %r6, [%r5];")[0][0]
    for classes in (1, 16):  # the warps come together, or one after the other
        assert run(f"{far} bar.sync 0; ld.shared.u32 %r6, [%r5];", classes=classes)[0] == []


def test_races_in_global_memory():
    assert "write by thread 0 of block 0, and write by thread 0 of block 1" in run("st.global.u32 [%rd3], %r1;")[0][0]
    store_and_load = (
        "xor.b32 %r3, %r1, 1; mul.wide.u32 %rd4, %r3, 4; add.s64 %rd4, %rd4, %rd1; st.global.u32 [%rd3], %r1;"
    )
    load = "ld.global.u32 %r4, [%rd4];"
    assert "write by thread 0 of block 0, and read" in run(FIRST_BLOCK + store_and_load + load)[0][0]
    assert run(f"{FIRST_BLOCK}{store_and_load} bar.sync 0; {load}")[0] == []


def test_memory_that_is_read_as_constant_must_not_be_written():
    constant = "ld.global.nc.u32 %r3, [%rd3];"
    assert run(constant)[0] == []
    assert "constant read" in run(f"{FIRST_BLOCK}{constant} st.global.u32 [%rd3], %r3;")[0][0]


@pytest.mark.parametrize("others", [5, 32])
def test_a_barrier_that_some_never_reach_is_a_deadlock(others):
    some = f"setp.lt.u32 %p1, %r1, {others}; @%p1 bra OTHER; bar.sync 0; OTHER: bar.sync 0;"
    assert "deadlock" in run(some)[0][0]


def test_atomics_count_every_thread():
    wrong, words = run("atom.global.add.u32 %r3, [%rd1], 1; red.global.add.u32 [%rd1+4], 2;")
    assert (wrong, words[:2]) == ([], [128, 256])


@pytest.mark.parametrize("classes", [1, 3])
def test_threads_that_part_meet_again(classes):
    part = "and.b32 %r3, %r1, 1; setp.eq.s32 %p2, %r3, 0; mov.u32 %r4, 100; @%p2 bra EVEN; mov.u32 %r4, 200; EVEN:"
    swap = "add.s32 %r4, %r4, %r1; shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1; st.global.u32 [%rd3], %r5;"
    wrong, words = run(FIRST_BLOCK + part + swap, classes=classes)
    assert wrong == []
    assert words == [(200 if k & 1 else 100) + (k ^ 16) for k in range(64)]


@pytest.mark.parametrize(
    ("mode", "numbers", "source"),
    [
        ("idx", "3, 31", lambda lane: 3),
        ("idx", "3, 0x181f", lambda lane: lane // 8 * 8 + 3),  # segments of 8
        ("bfly", "1, 31", lambda lane: lane ^ 1),
        ("down", "2, 31", lambda lane: lane + 2 if lane < 30 else lane),
        ("up", "2, 0", lambda lane: lane - 2 if lane >= 2 else lane),
    ],
)
def test_shuffles(mode, numbers, source):
    body = f"shfl.sync.{mode}.b32 %r3|%p2, %r1, {numbers}, -1; st.global.u32 [%rd3], %r3;"
    wrong, words = run(FIRST_BLOCK + body)
    assert wrong == []
    assert words == [k - k % 32 + source(k % 32) for k in range(64)]


def test_a_shuffle_with_lanes_that_are_gone():
    gone = "setp.eq.s32 %p2, %r1, 7; @%p2 ret; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;"
    assert any("exited lanes" in text for text in run(gone)[0])


def test_votes():
    own = "setp.eq.s32 %p2, %r1, 40;"
    wrong, words = run(f"{FIRST_BLOCK}{own} vote.sync.ballot.b32 %r3, %p2, -1; st.global.u32 [%rd3], %r3;")
    assert (wrong, words) == ([], [0] * 32 + [1 << 8] * 32)
    for kind, combined, value in (("bar", "or", 1), ("barrier", "or", 1), ("barrier", "and", 0)):
        vote = f"{kind}.red.{combined}.pred %p3, 0, %p2; selp.u32 %r3, 1, 0, %p3; st.global.u32 [%rd3], %r3;"
        assert run(FIRST_BLOCK + own + vote) == ([], [value] * 64)
    ordered = f"{SWAP} barrier.red.or.pred %p3, 0, %p1; ld.shared.u32 %r6, [%r5];"
    assert run(ordered)[0] == []  # it is a barrier


# ---- PTX's memory model: the block that counts itself last reads what the other one has written ----

OTHERS = """
xor.b32 %r3, %r2, 1; mul.wide.u32 %rd4, %r2, 8; add.s64 %rd4, %rd4, %rd1; mul.wide.u32 %rd5, %r3, 8;
add.s64 %rd5, %rd5, %rd1;
"""  # the addresses of this block's word and of the other's


def last_reads(
    before: str,
    count: str = "atom.global.add.u32",
    behind: str = "",
    writer: int = 0,
    reader: int = 0,
    shared: str = "",
) -> list[str]:
    """One thread of each block writes, thread 0 counts, and, in the last block, a thread reads the other's word."""
    body = f"{OTHERS} setp.ne.s32 %p1, %r1, {writer}; @%p1 bra A; st.global.u32 [%rd4+8], 7; A: mov.u32 %r4, 0;"
    body += f"{before} setp.ne.s32 %p1, %r1, 0; @%p1 bra B; {count} %r4, [%rd1], 1; B: {shared} {behind}"
    body += f"setp.ne.s32 %p2, %r4, 1; setp.ne.or.s32 %p2, %r1, {reader}, %p2; @%p2 ret; ld.global.u32 %r5, [%rd5+8];"
    return run(body)[0]


@pytest.mark.parametrize(
    ("before", "count", "behind"),
    [
        ("membar.gl;", "atom.global.add.u32", "membar.gl;"),
        ("fence.acq_rel.gpu;", "atom.relaxed.gpu.global.add.u32", "fence.sc.gpu;"),
        ("fence.acq_rel.gpu;", "atom.acquire.gpu.global.add.u32", ""),
        ("", "atom.release.gpu.global.add.u32", "membar.gl;"),
        ("", "atom.acq_rel.gpu.global.add.u32", ""),
    ],
)
def test_a_release_and_an_acquire_order_two_blocks(before, count, behind):
    assert last_reads(before, count, behind) == []


@pytest.mark.parametrize(
    ("before", "count", "behind"),
    [
        ("", "atom.global.add.u32", ""),
        ("membar.gl;", "atom.global.add.u32", ""),
        ("", "atom.global.add.u32", "membar.gl;"),
        ("", "atom.release.gpu.global.add.u32", ""),
        ("", "atom.acquire.gpu.global.add.u32", ""),
        ("bar.sync 0;", "atom.global.add.u32", "bar.sync 0;"),
    ],
)
def test_half_of_an_order_is_none(before, count, behind):
    assert "write by thread 0 of block 0, and read by thread 0 of block 1" in last_reads(before, count, behind)[0]


def test_a_barrier_passes_on_what_others_of_the_block_did():
    fences = {"count": "atom.acq_rel.gpu.global.add.u32", "writer": 40}
    assert last_reads("bar.sync 0;", **fences) == []
    assert "race" in last_reads("bar.warp.sync -1;", **fences)[0]
    assert last_reads("bar.warp.sync -1;", **fences | {"writer": 5}) == []


def test_a_barrier_passes_on_what_the_counting_thread_learns():
    """Thread 0 tells the others in shared memory, as Triton's code does."""
    told = "mov.u32 %r6, words; @!%p1 st.shared.u32 [%r6], %r4; bar.sync 0; ld.shared.u32 %r4, [%r6];"
    acquire = {"count": "atom.acq_rel.gpu.global.add.u32", "reader": 40}
    assert last_reads("", shared=told, **acquire) == []
    assert last_reads("membar.gl;", shared=told, reader=40) != []
    assert last_reads("", shared=told.replace("bar.sync 0;", "bar.warp.sync -1;"), **acquire) != []


def test_counts_in_between_pass_on_what_came_before():
    one = "setp.ne.s32 %p1, %r1, 0; @%p1 ret; mul.wide.u32 %rd4, %r2, 8; add.s64 %rd4, %rd4, %rd1;"
    count = "st.global.u32 [%rd4+8], 7; membar.gl; atom.global.add.u32 %r4, [%rd1], 1; membar.gl;"
    last = "setp.ne.s32 %p2, %r4, 3; @%p2 ret;"
    read = "".join(f"ld.global.u32 %r5, [%rd1+{8 * block + 8}];" for block in range(4))
    assert run(one + count + last + read, blocks=4)[0] == []


@pytest.mark.parametrize(("behind", "raced"), [("membar.gl;", True), ("membar.gl; bar.warp.sync -1;", False)])
def test_a_shuffle_orders_nothing(behind, raced):
    """Lane 1 learns of the count by a shuffle. Its own fence is no acquire: it has read nothing."""
    told = "shfl.sync.idx.b32 %r4, %r4, 0, 31, -1;"
    assert bool(last_reads("membar.gl;", behind=behind, reader=1, shared=told)) == raced


def test_who_has_observed_a_count_may_reset_it():
    last = "atom.global.add.u32 %r4, [%rd1], 1; setp.ne.s32 %p2, %r4, 1; @%p2 ret; st.global.u32 [%rd1], 0;"
    one = "setp.ne.s32 %p1, %r1, 0; @%p1 ret;"
    assert run(one + last)[0] == []
    assert "atomic" in run(one + last.replace("@%p2 ret;", ""))[0][0]


@pytest.mark.parametrize(("barrier", "raced"), [("bar.sync 0;", False), ("bar.warp.sync -1;", True)])
def test_who_waits_for_one_who_has_observed_a_count_may_reset_it(barrier, raced):
    count = "setp.ne.s32 %p1, %r1, 0; @%p1 bra A; atom.global.add.u32 %r4, [%rd1], 1; A: mov.u32 %r6, words;"
    told = f"@!%p1 st.shared.u32 [%r6], %r4; {barrier} ld.shared.u32 %r4, [%r6];"
    reset = "setp.ne.s32 %p2, %r4, 1; setp.ne.or.s32 %p2, %r1, 40, %p2; @%p2 ret; st.global.u32 [%rd1], 0;"
    assert any("atomic" in text for text in run(count + told + reset)[0]) == raced


@pytest.mark.parametrize(("fence", "raced"), [("membar.gl;", False), ("", True)])
def test_what_is_learned_from_one_count_is_passed_on_by_another(fence, raced):
    """Block 0 writes, block 1 learns of it, and block 2 of that."""
    one = "setp.ne.s32 %p1, %r1, 0; @%p1 ret; setp.eq.s32 %p1, %r2, 1; setp.eq.s32 %p2, %r2, 2; @%p1 bra B; @%p2 bra C;"
    first = "st.global.u32 [%rd1+8], 7; membar.gl; atom.global.add.u32 %r4, [%rd1], 1; ret;"
    second = f"B: atom.global.add.u32 %r4, [%rd1], 1; {fence} atom.global.add.u32 %r4, [%rd1+4], 1; ret;"
    third = "C: atom.global.add.u32 %r4, [%rd1+4], 1; membar.gl; ld.global.u32 %r5, [%rd1+8];"
    assert bool(run(one + first + second + third, blocks=3)[0]) == raced


# ---- What is not known ----


@pytest.mark.parametrize(
    "body",
    [
        "foo.b32 %r1, %r2;",
        "add.sat.s32 %r3, %r1, 1;",
        "mul.f32.rn %f1, %f1, %f1;",
        "add.rz.f32 %f1, %f1, %f1;",
        "fma.rn.f64 %rd1, %rd1, %rd1, %rd1;",
        "add.s32 %r3, %r1;",
        "add.s32 %r3, %rd1, 1;",
        "add.s32 %r99, %r1, 1;",
        "mov.u32 %r3, %clock;",
        "ld.local.u32 %r3, [%rd1];",
        "ld.volatile.global.u32 %r3, [%rd1];",
        "atom.global.cas.b32 %r3, [%rd1], 1, 2;",
        "atom.cta.global.add.u32 %r3, [%rd1], 1;",
        "fence.acq_rel.cta;",
        "bar.sync 1;",
        "bar.sync 0, 32;",
        "shfl.idx.b32 %r3, %r1, 0, 31;",
        "@%p1 bar.sync 0;",
        "bra NOWHERE;",
        "trap;",
    ],
)
def test_what_is_not_known_is_refused(body):
    with pytest.raises(PtxError):
        run(body)
