"""The PTX interpreter's checks: accesses, races, barriers, shuffles, and what it refuses, by kernels of a few lines."""

from __future__ import annotations

import pytest

from tests.support.ptx.memory import INITIALISED, READ, WRITE
from tests.support.ptx.parse import PtxError
from tests.support.ptx.tiny import FIRST_BLOCK, run


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


@pytest.mark.parametrize(
    ("what", "raced"),
    [
        ("mov.u32 %r4, 7;", False),
        ("mov.u32 %r4, %r1;", True),
        ("and.b32 %r4, %r1, 30;", True),  # pairs of lanes do
    ],
)
def test_lanes_that_store_the_same_value_at_a_place_are_one(what, raced):
    lanes = "setp.gt.u32 %p1, %r1, 31; @%p1 ret; mov.u32 %r3, words;"
    assert bool(run(f"{FIRST_BLOCK}{lanes}{what} st.shared.u32 [%r3], %r4;")[0]) == raced
    assert "race" in run(f"{FIRST_BLOCK} mov.u32 %r3, words; {what} st.shared.u32 [%r3], %r4;")[0][0]  # two warps


def test_a_branch_by_an_index():
    body = "T: .branchtargets A, B, C, B; and.b32 %r3, %r1, 3; brx.idx %r3, T; A: mov.u32 %r4, 5; bra D;"
    body += "B: mov.u32 %r4, 6; bra D; C: mov.u32 %r4, 7; D: st.global.u32 [%rd3], %r4;"
    assert run(FIRST_BLOCK + body) == ([], [5, 6, 7, 6] * 16)
    beyond = body.replace("%r1, 3;", "%r1, 4;")
    assert "branch: to place 4 of 4" in run(FIRST_BLOCK + beyond)[0][0]
    with pytest.raises(PtxError, match="not known"):
        run(body.replace("brx.idx %r3, T;", "brx.idx %r3, A;"))


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


@pytest.mark.parametrize(
    "body",
    [
        "foo.b32 %r1, %r2;",
        "add.sat.s32 %r3, %r1, 1;",
        "mul.f32.rn %f1, %f1, %f1;",
        "add.rz.f32 %f1, %f1, %f1;",
        "fma.rz.f64 %rd1, %rd1, %rd1, %rd1;",
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
