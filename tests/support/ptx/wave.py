"""The threads that run side by side: their registers, and which of them run which block next.

Threads that have diverged meet again because those at the earliest block go first. At a barrier, a shuffle or a vote
they wait until their cluster, block or warp is there. A wave has whole clusters, whose blocks follow one another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tests.support.ptx.accesses import POISON, trace_order
from tests.support.ptx.arithmetic import UNSIGNED, Array
from tests.support.ptx.parse import PtxError
from tests.support.ptx.warps import LANES

if TYPE_CHECKING:
    from tests.support.ptx.launch import Launch

Threads: TypeAlias = "slice | Array"
"""Threads of a wave: a slice of all of them, or an array of their places."""
Successors: TypeAlias = "tuple[tuple[int, Threads], ...]"
"""Which threads go on at which block."""
MAX_STEPS = 2_000_000


class Wave:
    """Runs blocks of a launch to their end."""

    def __init__(self, launch: Launch, blocks: Array, classes: int) -> None:
        self.launch = launch
        threads, self.size = launch.threads, len(blocks) * launch.threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.block = np.repeat(blocks, threads).astype(np.uint32)
        self.row = np.repeat(np.arange(len(blocks)), threads)  # of the block in this wave
        self.number = self.block.astype(np.int64) * threads + self.thread
        self.block_size = np.full(self.size, threads, np.uint32)
        self.grid_size = np.full(self.size, launch.blocks, np.uint32)
        self.lane = self.thread % np.uint32(LANES)
        self.zero, self.one = np.zeros(self.size, np.uint32), np.ones(self.size, np.uint32)
        self.everyone = np.arange(self.size)
        self.exited = np.zeros(self.size, np.bool_)
        self.shared = np.zeros((len(blocks), launch.shared_bytes), np.uint8)
        self.shared_written = np.zeros(self.shared.shape, np.bool_)
        self.registers = self._poisoned()
        warps = launch.random.integers(0, classes, self.size // LANES)
        self.classes, self.class_of = classes, np.repeat(warps, LANES)
        self.ready: dict[tuple[int, int], list[Threads]] = {}
        self.waiting: dict[int, list[Threads]] = defaultdict(list)

    def _poisoned(self) -> list[Array]:
        """Make registers that hold nothing yet; those of one dtype are rows of one array."""
        dtypes = [dtype for _, dtype in self.launch.code.kernel.registers.values()]
        rows = {}
        for dtype, count in Counter(dtypes).items():
            bits = UNSIGNED[np.dtype(dtype).itemsize]
            value = 0 if dtype is np.bool_ else POISON.astype(bits)
            rows[dtype] = iter(np.full((count, self.size), value, bits).view(dtype))
        return [next(rows[dtype]) for dtype in dtypes]

    # -- Scheduling --

    def run(self) -> None:
        """Run until all have exited. Warps of a lower class run as far as they can before others begin."""
        self._make_ready(0, slice(None))
        for _ in range(MAX_STEPS):
            if not self.ready:
                if not self.waiting:
                    return
                if not self._release():
                    self.find("deadlock", "threads wait for others of their cluster, block or warp that never come")
                    return
                continue
            number = min(self.ready)
            threads = self._joined(self.ready.pop(number))
            if self.launch.code.waits[number[1]]:
                self.waiting[number[1]].append(threads)
            else:
                self._step(number[1], threads)
        raise PtxError(f"{self.launch.code.kernel.name} runs for ever")

    def _make_ready(self, number: int, threads: Threads) -> None:
        if self.classes == 1:
            self.ready.setdefault((0, number), []).append(threads)
            return
        index = self.members(threads)
        for one in np.unique(self.class_of[index]):
            self.ready.setdefault((int(one), number), []).append(index[self.class_of[index] == one])

    def _joined(self, groups: list[Threads]) -> Threads:
        if len(groups) == 1:
            return groups[0]
        index = np.sort(np.concatenate([self.members(group) for group in groups]))
        return slice(None) if len(index) == self.size else index

    def _step(self, number: int, threads: Threads) -> None:
        self.launch.executed[number] += self.count(threads)
        for successor, group in self.launch.code.block(number)(self, threads):
            self._make_ready(successor, group)

    def _release(self) -> bool:
        """Run the block of those whose cluster, block or warp is there completely; return whether there were any."""
        for number in sorted(self.waiting):
            index = self.members(self._joined(self.waiting[number]))
            kind = self.launch.code.waits[number]
            warp, unit = kind == "warp", self.launch.units[kind]
            here = self.exited.copy()
            here[index] = True
            complete = np.repeat(here.reshape(-1, unit).all(1), unit)[index]
            if not complete.any():
                continue
            del self.waiting[number]
            if not complete.all():
                self.waiting[number] = [index[~complete]]
            released = index[complete]
            if warp and self.exited.reshape(-1, LANES)[released // LANES].any():
                self.find("exited lanes", "others of their warp wait for them")
            self._step(number, slice(None) if len(released) == self.size else released)
            return True
        return False

    # -- What the code of a block calls --

    def members(self, threads: Threads) -> Array:
        return self.everyone if isinstance(threads, slice) else threads

    def count(self, threads: Threads) -> int:
        return self.size if isinstance(threads, slice) else len(threads)

    def numbers(self, threads: Threads) -> Array:
        """Return the threads' numbers in the grid."""
        return self.number[threads]

    def find(self, kind: str, text: str) -> None:
        self.launch.find(kind, text)

    def order(self, kind: str, threads: Threads) -> None:
        trace_order(self, kind, threads)

    def split(self, threads: Threads, predicate: Array, target: int, following: int) -> Successors:
        """Send those with the predicate to one block, and the others to another."""
        if predicate.all():
            return ((target, threads),)
        if not predicate.any():
            return ((following, threads),)
        index = self.members(threads)
        return ((target, index[predicate]), (following, index[~predicate]))

    def choose(self, threads: Threads, place: Array, targets: tuple[int, ...]) -> Successors:
        """Send each thread to one of several blocks, by its place among them."""
        index, place = self.members(threads), np.broadcast_to(place, self.count(threads))
        if (place >= len(targets)).any():
            self.find("branch", f"to place {place.max()} of {len(targets)}")
            place = np.minimum(place, len(targets) - 1)
        chosen = np.unique(place)
        if len(chosen) == 1:
            return ((targets[chosen[0]], threads),)
        return tuple((targets[k], index[place == k]) for k in chosen)

    def where(self, threads: Threads, predicate: Array) -> Threads | None:
        """Return those with the predicate, if any."""
        if predicate.all():
            return threads
        return self.members(threads)[predicate] if predicate.any() else None

    def leave(self, threads: Threads, predicate: Array | bool = True, following: int = 0) -> Successors:
        """Let those with the predicate exit."""
        index = self.members(threads)
        leaving = np.broadcast_to(predicate, len(index))
        self.exited[index[leaving]] = True
        rest = index[~leaving]
        return ((following, rest),) if len(rest) else ()
