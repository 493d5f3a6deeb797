"""Threads of every kernel are followed through their machine code: they access what the same threads on the host do."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import pytest
import torch

from benchmarks.machine_code import sass
from benchmarks.machine_code.__main__ import why_not
from benchmarks.machine_code.figures import ARCHITECTURE
from benchmarks.machine_code.launches import HOT, Launch, prepare
from benchmarks.machine_code.trace import follow
from fastguide.step.backends import native
from tests.support import device_code

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no machine code to follow: {why_not()}"),
    pytest.mark.xdist_group("machine code"),  # one process reads the library once
]

NOISES = ("none", "given", "portable", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def kernels():
    return sass.read_kernels(native.LIBRARY, ARCHITECTURE, list(sass.names(native.LIBRARY, ARCHITECTURE)))


def traced(prepared, block, number):
    code = kernels()[prepared.recorded.kernel]
    return follow(code, prepared.constants(ARCHITECTURE), prepared.memory(), block, number)


def variants(noise):
    """Launches of every variant that has this noise, and of both ways to divide them."""
    switches = itertools.product((1, 2, 3), (False, True), (False, True), (False, True), (0, 2), DTYPES)
    for predictions, extras, history, original, copies, model in switches:
        few = [((4, 4, 96, 96), 1024), ((4, 4, 96, 96), 0)]  # a vector a thread, and two where it may have two
        torches = [((4, 4, 256, 256), 1024), ((2, 8, 32), 1024)]
        for shape, few_tiles in torches if noise == "torch" else few:
            tensors = {"gradient": extras, "variance": extras, "masked": extras, "original": original, "copies": copies}
            tensors["history"] = history
            state = torch.bfloat16 if model == torch.bfloat16 else torch.float32
            cursor = model == torch.float16
            yield Launch("", predictions, noise, state, model, shape, cursor=cursor, few_tiles=few_tiles, **tensors)


def test_every_variant_is_followed_here():
    launched = {prepare(launch).recorded.kernel for noise in NOISES for launch in variants(noise)}
    launched.add(prepare(HOT[-1]).recorded.kernel)  # the way back
    before = "moments_kernel", "groups_kernel", "thresholds_kernel"
    assert launched == {name for name in kernels() if not name.startswith(before)}


@pytest.mark.parametrize("noise", NOISES)
def test_a_thread_s_accesses_are_those_of_the_same_thread_on_the_host(noise):
    """So every address, and every branch on the way, was computed rightly of the launch's parameters."""
    for launch in variants(noise):
        prepared = prepare(launch)
        block = prepared.recorded.blocks // 2
        trace = traced(prepared, block, 77)
        found = [access.address for access in (*trace.loads, *trace.stores) if access.data and access.size == 16]
        host = device_code.module().accesses_of(prepared.plain, block, 77)
        assert sorted(found) == sorted(host), launch
        singly = launch.gradient + launch.history + (launch.predictions == 3) >= 2  # too many registers in vectors
        assert found or (noise == "torch" and (singly or launch.shape == (2, 8, 32))), launch


@pytest.mark.parametrize(
    "launch", [launch for launch in HOT if launch.noise != "torch"], ids=lambda launch: launch.label
)
def test_a_block_computes_neighbouring_vectors(launch):
    """Each thread reads of every tensor what it writes, and the block's elements are tiles without gaps."""
    prepared, elements = prepare(launch), Counter()
    block = min(12345, prepared.recorded.blocks // 2)
    for number in range(128):
        trace = traced(prepared, block, number)
        places = {}
        for access in (*trace.loads, *trace.stores):
            if access.data:
                tensor = prepared.tensors[access.region]
                begin = (access.address - tensor.data_ptr()) // tensor.element_size()
                places.setdefault(access.region, Counter()).update(
                    range(begin, begin + access.size // tensor.element_size())
                )
        assert set(places) == set(prepared.data)
        staged = places.pop("staged", Counter())  # the others, in each copy
        assert len(staged) == launch.copies * len(places["out"])
        if launch.solver:  # of each slot that is read or written, the elements of the output
            history, size = places.pop("history"), prepared.tensors["out"].numel()
            assert {place % size for place in history} == set(places["out"])
            assert 4 * history.total() * size == len(places["out"]) * history_bytes(prepared)
        assert all(place == places["out"] for place in places.values())
        elements += places["out"]
    tile = device_code.module().tile
    assert elements == Counter(range(min(elements), min(elements) + len(elements)))
    assert min(elements) % len(elements) == len(elements) % tile == 0


def history_bytes(prepared):
    others = [prepared.tensors[name] for name in prepared.data if name != "history"]
    return prepared.bytes() - sum(tensor.nbytes for tensor in others)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("offset", [0, 1])
def test_all_threads_of_a_launch_store_each_element_once(noise, offset):
    prepared = prepare(Launch("", 2, noise, shape=(2, 133), offset=offset))
    out, elements = prepared.tensors["out"], Counter()
    for block, number in itertools.product(range(prepared.recorded.blocks), range(prepared.recorded.threads)):
        for store in traced(prepared, block, number).stores:
            assert store.region == "out"
            begin = (store.address - out.data_ptr()) // 4
            elements.update(range(begin, begin + store.size // 4))
    assert elements == Counter(range(2 * 133))


@pytest.mark.parametrize("launch", HOT, ids=lambda launch: launch.label)
def test_a_warp_issues_what_one_of_its_threads_does(launch):
    """The lanes go the same way; a lane of another block, too."""
    prepared = prepare(launch)
    block = prepared.recorded.blocks // 2
    ways = {traced(prepared, block, number).path for number in range(64, 96, 5)}
    assert ways == {traced(prepared, block // 2, 77).path}
