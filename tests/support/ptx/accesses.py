"""What kernels do to memory: each access is checked and traced. Functions for the code that movements.py writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx.arithmetic import UNSIGNED, Array
from tests.support.ptx.memory import GRANULE, INITIALISED, READ, WRITE
from tests.support.ptx.operands import PARAMETERS, SHARED
from tests.support.ptx.trace import Access, Order, Strong

if TYPE_CHECKING:
    from tests.support.ptx.wave import Threads, Wave

POISON = np.uint64(0xA5A5_A5A5_A5A5_A5A5)
"""What is read where nothing may be read."""
UPDATES = {
    "add": lambda old, value: old + value,
    "exch": lambda old, value: value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
}
LANES = 32
SHARED_SPAN = 1 << 24
"""The places of blocks' shared memory in the trace are so far apart."""


def load_parameters(wave: Wave, address: Array, dtype: type[np.generic], count: int) -> Array:
    """Read so many values of the kernel's parameters, at one address or at one for each thread."""
    size = np.dtype(dtype).itemsize * count
    places = np.asarray(address, np.uint64) - np.uint64(PARAMETERS)
    parameters = wave.launch.parameters
    wrong = (places > np.uint64(len(parameters) - size)) | (places % np.uint64(size) != 0)
    if np.any(wrong):
        wave.find("parameters", f"{size} bytes at byte {int(np.max(places))} of {len(parameters)}")
        places = np.where(wrong, np.uint64(0), places)
    return parameters[places.astype(np.int64)[..., None] + np.arange(size)].view(dtype)


# ---- Global memory ----


def _checked(wave: Wave, address: Array, size: int, need: int, what: str, threads: Threads) -> tuple[Array, Array]:
    """Return the places in memory, 0 for a wrong address, and which of them may be accessed so."""
    memory = wave.launch.memory
    places = np.broadcast_to(address, wave.count(threads)) - np.uint64(memory.base)
    inside = places <= np.uint64(len(memory.bytes) - size)
    aligned = places % np.uint64(size) == 0
    at = np.where(inside & aligned, places, np.uint64(0)).astype(np.int64)
    flags = memory.flags[(at // GRANULE)[:, None] + np.arange(max(size // GRANULE, 1))]
    fine = inside & aligned & ((flags & need) == need).all(1)
    wrong = ~fine
    for begin, end in memory.unplaced:
        wrong &= (address < np.uint64(begin)) | (address >= np.uint64(end))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        if inside[first] and not aligned[first]:
            why = "misaligned"
        elif inside[first] and (flags[first] & need | INITIALISED == need | INITIALISED).all():
            why = "not initialised"
        else:
            why = "out of bounds"
        where = memory.name_of(int(places[first].view(np.int64)))
        by = wave.launch.thread_name(wave.numbers(threads)[first])
        wave.find(f"{why}, {what}", f"{size} bytes at {where}, by {by} and {int(wrong.sum()) - 1} others")
    return at, fine


def load(wave: Wave, address: Array, dtype: type, count: int, threads: Threads, kind: str) -> Array:
    """Read so many values for each thread; kind: read, constant read, relaxed or acquire."""
    size = np.dtype(dtype).itemsize
    at, fine = _checked(wave, address, size * count, READ | INITIALISED, "read", threads)
    numbers, trace = wave.numbers(threads), wave.launch.trace
    strong = kind in ("relaxed", "acquire")
    sequence = trace.next()
    trace.accesses.append(Access(sequence, "atomic" if strong else kind, at[fine], size * count, numbers[fine]))
    if strong:
        trace.strong += [
            Strong(sequence, int(place), int(thread), "read", kind == "acquire", False)
            for place, thread in zip(at[fine], numbers[fine], strict=True)
        ]
    values = wave.launch.memory.bytes.view(dtype)[(at // size)[:, None] + np.arange(count)]
    if not fine.all():
        values[~fine] = np.array([POISON]).view(dtype)[0]
    return values


def store(wave: Wave, address: Array, dtype: type, values: tuple, threads: Threads, kind: str) -> None:
    """Write values of each thread; kind: write, relaxed or release."""
    size, count = np.dtype(dtype).itemsize, len(values)
    at, fine = _checked(wave, address, size * count, WRITE, "write", threads)
    numbers, trace = wave.numbers(threads), wave.launch.trace
    strong = kind != "write"
    sequence = trace.next()
    trace.accesses.append(Access(sequence, "atomic" if strong else kind, at[fine], size * count, numbers[fine]))
    if strong:
        trace.strong += [
            Strong(sequence, int(place), int(thread), "write", False, kind == "release")
            for place, thread in zip(at[fine], numbers[fine], strict=True)
        ]
    memory = wave.launch.memory
    elements, granules = memory.bytes.view(dtype), max(size * count // GRANULE, 1)
    for k, value in enumerate(values):
        elements[at[fine] // size + k] = np.broadcast_to(value, len(at))[fine]
    memory.flags[(at[fine] // GRANULE)[:, None] + np.arange(granules)] |= INITIALISED


def update(
    wave: Wave,
    address: Array,
    value: Array,
    dtype: type,
    operation: str,
    threads: Threads,
    acquires: bool,
    releases: bool,
) -> Array:
    """Update a place for one thread after the other, in any order, and return what each has found there."""
    size, trace = np.dtype(dtype).itemsize, wave.launch.trace
    at, fine = _checked(wave, address, size, READ | WRITE | INITIALISED, "atomic", threads)
    values, numbers = np.broadcast_to(value, len(at)), wave.numbers(threads)
    memory, before = wave.launch.memory.bytes.view(dtype), np.zeros(len(at), dtype)
    sequence = trace.next()
    trace.accesses.append(Access(sequence, "atomic", at[fine], size, numbers[fine]))
    for k in wave.launch.random.permutation(len(at)):
        if fine[k]:
            place = int(at[k])
            before[k] = memory[place // size]
            memory[place // size] = UPDATES[operation](before[k], values[k])
            trace.strong.append(Strong(sequence, place, int(numbers[k]), "update", acquires, releases))
    return before


# ---- Shared memory ----


def _shared_places(wave: Wave, address: Array, size: int, threads: Threads) -> Array:
    places = np.broadcast_to(address, wave.count(threads)) - np.uint64(SHARED)
    inside = places <= np.uint64(max(wave.shared.shape[1] - size, 0))
    fine = inside & (places % np.uint64(size) == 0) & (wave.shared.shape[1] >= size)
    if not fine.all():
        wave.find("shared memory", f"{size} bytes at byte {int(places[~fine][0])} of {wave.shared.shape[1]}")
    return np.where(fine, places, np.uint64(0)).astype(np.int64)


def _trace_shared(wave: Wave, kind: str, at: Array, size: int, threads: Threads, same: Array | None = None) -> None:
    trace, blocks = wave.launch.trace, wave.block[threads].astype(np.int64)
    trace.shared.append(Access(trace.next(), kind, at + blocks * SHARED_SPAN, size, wave.numbers(threads), same))


def load_shared(wave: Wave, address: Array, dtype: type, count: int, threads: Threads) -> Array:
    size = np.dtype(dtype).itemsize * count
    at, block = _shared_places(wave, address, size, threads), wave.row[threads]
    columns = at[:, None] + np.arange(size)
    if not wave.shared_written[block[:, None], columns].all():
        wave.find("not initialised", f"shared memory at byte {int(at[0])}")
    _trace_shared(wave, "read", at, size, threads)
    return wave.shared[block[:, None], columns].view(dtype).reshape(len(at), count)


def store_shared(wave: Wave, address: Array, dtype: type, values: tuple, threads: Threads) -> None:
    item = np.dtype(dtype).itemsize
    at, block = _shared_places(wave, address, item * len(values), threads), wave.row[threads]
    stored = [np.ascontiguousarray(np.broadcast_to(value, len(at))).view(UNSIGNED[item]) for value in values]
    writers = _writers(wave.numbers(threads), at, stored)
    _, same = np.unique(np.stack([at.astype(np.uint64), *stored])[:, writers], axis=1, return_inverse=True)
    _trace_shared(wave, "write", at[writers], item * len(values), wave.members(threads)[writers], same.reshape(-1))
    for k, value in enumerate(stored):
        columns = at[:, None] + k * item + np.arange(item)
        wave.shared[block[:, None], columns] = value.view(np.uint8).reshape(len(at), item)
        wave.shared_written[block[:, None], columns] = True


def _writers(numbers: Array, at: Array, stored: list[Array]) -> Array:
    """Leave out lanes of a warp that store what the first one stores at its place: of several, one does."""
    _, first, group = np.unique(numbers // LANES * SHARED_SPAN + at, return_index=True, return_inverse=True)
    leader = first[group]
    same = np.logical_and.reduce([value == value[leader] for value in stored])
    return ~same | (leader == np.arange(len(at)))


def update_shared(wave: Wave, address: Array, value: Array, dtype: type, operation: str, threads: Threads) -> Array:
    """Update a place of a block's own memory for one thread after the other, and return what each has found."""
    size = np.dtype(dtype).itemsize
    at, block = _shared_places(wave, address, size, threads), wave.row[threads]
    values, before = np.broadcast_to(value, len(at)), np.zeros(len(at), dtype)
    if not wave.shared_written[block[:, None], at[:, None] + np.arange(size)].all():
        wave.find("not initialised", f"shared memory at byte {int(at[0])}")
    _trace_shared(wave, "atomic", at, size, threads)
    memory = wave.shared.view(dtype)
    for k in wave.launch.random.permutation(len(at)):
        place = block[k], at[k] // size
        before[k] = memory[place]
        memory[place] = UPDATES[operation](before[k], values[k])
    return before


def trace_order(wave: Wave, kind: str, threads: Threads) -> None:
    """Trace a barrier or a fence."""
    trace = wave.launch.trace
    trace.orders.append(Order(trace.next(), kind, wave.numbers(threads)))
