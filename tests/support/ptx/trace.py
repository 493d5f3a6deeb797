"""What a launch did to memory, in its order: for races.py, and to count how often each place was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tests.support.ptx.arithmetic import Array


class Access(NamedTuple):
    """Accesses of threads by one instruction: a place in bytes for each thread, all of one size.

    kind: read, write, constant read (of memory that nothing may write), or atomic.
    same: of writes to shared memory, a number for each thread that those have in common who write the same bits at the
    same place.
    """

    sequence: int
    kind: str
    places: Array
    size: int
    threads: Array
    same: Array | None = None


class Order(NamedTuple):
    """A barrier of clusters, of blocks, or of warps, a fence, or a shuffle, of these threads."""

    sequence: int
    kind: str  # cluster, block, warp, fence, shuffle
    threads: Array


class Strong(NamedTuple):
    """One thread's strong access to a place."""

    sequence: int
    place: int
    thread: int
    kind: str  # read, write, or update: both
    acquires: bool
    releases: bool


@dataclass
class Trace:
    """Everything in the order of the interpretation. Threads have numbers of their own in the grid."""

    sequence: int = 0
    accesses: list[Access] = field(default_factory=list)
    shared: list[Access] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    strong: list[Strong] = field(default_factory=list)

    def next(self) -> int:
        self.sequence += 1
        return self.sequence
