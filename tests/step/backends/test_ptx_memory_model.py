"""The order of accesses in the PTX interpreter: releases and acquires by atomics, as PTX's memory model has them.

Mostly of two blocks, each of which writes and then counts itself. The one that counts last reads what the other wrote.
"""

from __future__ import annotations

import pytest

from tests.support.ptx.parse import PtxError
from tests.support.ptx.tiny import run

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
        ("", "atom.add.release.gpu.u32", "fence.acq_rel.gpu;"),  # as libcu++ writes it
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
def test_a_shuffle_passes_on_no_acquire(behind, raced):
    """Lane 1 learns of the count by a shuffle. Its own fence is no acquire: it has read nothing."""
    told = "shfl.sync.idx.b32 %r4, %r4, 0, 31, -1;"
    assert bool(last_reads("membar.gl;", behind=behind, reader=1, shared=told)) == raced


@pytest.mark.parametrize(
    ("read_first", "shuffle", "raced"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_shuffle_passes_on_what_was_read(read_first, shuffle, raced):
    """Lane 0 reads what lane 1 then overwrites: the value goes from one to the other; or the other way round."""
    one = "setp.ne.s32 %p1, %r1, 0; setp.ne.s32 %p2, %r1, 1; mov.u32 %r4, 7;"
    read, write = "@!%p1 ld.global.u32 %r4, [%rd1];", "@!%p2 st.global.u32 [%rd1], %r4;"
    told = "shfl.sync.idx.b32 %r4, %r4, 0, 31, -1;" if shuffle else ""
    steps = (read, told, write) if read_first else (write, told, read)
    assert bool(run(one + "".join(steps), blocks=1)[0]) == raced


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


@pytest.mark.parametrize(
    ("value", "behind", "found"),
    [
        ("7", "bar.sync 0;", []),
        (
            "%r3",
            "bar.sync 0;",
            ["write by thread 0 of block 0, and write by thread 32 of block 0"],
        ),  # its warp's number
        ("7", "bar.warp.sync -1;", ["and read by thread"]),
    ],
)
def test_warps_may_write_the_same_bits_to_shared_memory(value, behind, found):
    """By one instruction, as Triton's code does where each warp has all values; a barrier orders them and the reads."""
    body = f"shr.u32 %r3, %r1, 5; mov.u32 %r6, words; st.shared.u32 [%r6+4], {value}; {behind}"
    wrong = run(f"{body} ld.shared.u32 %r5, [%r6+4];", blocks=1, agreeing=True)[0]
    assert bool(wrong) == bool(found)
    assert all(text in wrong[0] for text in found)


def test_the_same_bits_of_two_instructions_are_a_race():
    half = "setp.ge.u32 %p1, %r1, 32; mov.u32 %r6, words; @%p1 bra A; st.shared.u32 [%r6], 7; ret;"
    assert "race" in run(f"{half} A: st.shared.u32 [%r6], 7;", blocks=1, agreeing=True)[0][0]


CLUSTER_BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


@pytest.mark.parametrize(
    ("between", "cluster", "raced"),
    [
        (CLUSTER_BARRIER, 2, False),
        ("barrier.cluster.arrive; barrier.cluster.wait;", 2, False),
        (CLUSTER_BARRIER, 1, True),  # which then is one of each block
        ("bar.sync 0;", 2, True),
        ("membar.gl;", 2, True),
    ],
)
def test_a_barrier_of_a_cluster_orders_its_blocks(between, cluster, raced):
    """Thread 0 of each block writes, and thread 1 reads what the other block wrote."""
    body = f"{OTHERS} setp.ne.s32 %p1, %r1, 0; @%p1 bra A; st.global.u32 [%rd4+8], 7; A: {between}"
    body += "setp.ne.s32 %p2, %r1, 1; @%p2 ret; ld.global.u32 %r5, [%rd5+8];"
    for classes in (1, 3):
        wrong, _ = run(body, classes=classes, cluster=cluster)
        assert any("race" in text for text in wrong) == raced
        assert bool(wrong) == raced


def test_a_cluster_does_not_wait_for_what_has_exited():
    assert run(f"setp.eq.s32 %p1, %r2, 1; @%p1 ret; {CLUSTER_BARRIER}", cluster=2)[0] == []


@pytest.mark.parametrize(
    "body",
    [
        "barrier.cluster.arrive;",
        "barrier.cluster.wait;",
        "barrier.cluster.arrive; mov.u32 %r3, 1; barrier.cluster.wait;",
        "barrier.cluster.arrive.relaxed; barrier.cluster.wait;",
        "@%p1 barrier.cluster.arrive; barrier.cluster.wait;",
    ],
)
def test_halves_of_a_cluster_s_barrier_are_refused(body):
    with pytest.raises(PtxError):
        run(body)
