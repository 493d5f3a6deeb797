"""What the threads of a warp or of a block do together: shuffles, votes, and matrices in shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx.accesses import load_shared, store_shared
from tests.support.ptx.arithmetic import Array

if TYPE_CHECKING:
    from tests.support.ptx.wave import Threads, Wave

LANES = 32
SHUFFLES = ("idx", "bfly", "down", "up")


def shuffle(
    wave: Wave, mode: str, every: Array, distance: Array, clamp: Array, mask: Array, threads: Threads
) -> tuple[Array, Array]:
    """Return the values of other lanes, or each lane's own where there is none, and where there is one.

    ``every`` has the values of all threads of the wave. As PTX describes ``shfl``.
    """
    wave.order("shuffle", threads)
    index = wave.members(threads)
    every = np.broadcast_to(every, wave.size)
    present = np.zeros(wave.size, np.bool_)
    present[index] = True
    lane = index % LANES
    numbers = (np.broadcast_to(np.asarray(x, np.uint32), len(index)).astype(np.int64) for x in (distance, clamp, mask))
    distance, clamp, mask = numbers
    segment, limit, distance = (clamp >> 8) & 31, clamp & 31, distance & 31
    lowest = lane & segment
    highest = lowest | (limit & ~segment & 31)
    source = {
        "idx": lowest | (distance & ~segment & 31),
        "bfly": lane ^ distance,
        "down": lane + distance,
        "up": lane - distance,
    }[mode]
    inside = source >= highest if mode == "up" else source <= highest
    source = index - lane + np.where(inside, source, lane)
    asked = ((mask[:, None] >> np.arange(LANES)) & 1).astype(np.bool_)
    if not asked[np.arange(len(index)), lane].all():
        wave.find("shuffle", "by a lane that its mask leaves out")
    if not (present.reshape(-1, LANES)[index // LANES] | ~asked).all():
        wave.find("shuffle", "a lane of the mask is not there")
    if not present[source].all():
        wave.find("shuffle", "of a lane that is not there")
    return every[source], inside


def vote(wave: Wave, mode: str, values: Array, threads: Threads) -> Array:
    """Return whether any or all lanes of the warp have the predicate, or the bits of those that have."""
    index = wave.members(threads)
    holds = np.zeros(wave.size, np.bool_)
    holds[index] = values
    missing = np.ones(wave.size, np.bool_)
    missing[index] = False
    lanes, absent = holds.reshape(-1, LANES), missing.reshape(-1, LANES)
    if absent[index // LANES].any():
        wave.find("vote", "a lane of the mask is not there")
    ballots = (lanes.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1).astype(np.uint32)
    each = {"any": lanes.any(1), "all": (lanes | absent).all(1), "ballot": ballots}[mode]
    return each[index // LANES]


def of_block(wave: Wave, mode: str, values: Array, threads: Threads) -> Array:
    """Return whether any (or) or all (and) threads of the block have the predicate."""
    index = wave.members(threads)
    holds = np.full(wave.size, mode == "and")
    holds[index] = values
    rows = holds.reshape(-1, wave.launch.threads)
    return (rows.any(1) if mode == "or" else rows.all(1))[wave.row[index]]


def _matrix_places(wave: Wave, address: Array, number: int, index: Array) -> Array:
    """Return where lanes have their two elements of a matrix, whose eight rows begin where eight lanes say."""
    lane = index % LANES
    rows = np.broadcast_to(address, wave.size)[index - lane + 8 * number + lane // 4]
    if (rows % np.uint64(16) != 0).any():
        wave.find("shared memory", "a misaligned row of a matrix")
    return rows + (4 * (lane % 4)).astype(np.uint64)


def store_matrix(wave: Wave, address: Array, values: tuple, threads: Threads) -> None:
    """Write matrices of 8 by 8; ``address`` and ``values`` are those of all threads of the wave."""
    index = wave.members(threads)
    for number, value in enumerate(values):
        own = np.broadcast_to(value, wave.size)[index]
        store_shared(wave, _matrix_places(wave, address, number, index), np.uint32, (own,), index)


def load_matrix(wave: Wave, address: Array, count: int, threads: Threads) -> list[Array]:
    """Read matrices of 8 by 8; ``address`` is that of all threads of the wave."""
    index = wave.members(threads)
    places = (_matrix_places(wave, address, number, index) for number in range(count))
    return [load_shared(wave, place, np.uint32, 1, index)[:, 0] for place in places]
