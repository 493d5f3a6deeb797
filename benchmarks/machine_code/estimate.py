"""Estimates the time of a launch by a roofline, and how many bytes a multiprocessor has in flight.

An ESTIMATE, of counted instructions and of the assumptions below: nothing here was measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS = 132
ISSUES = 4  # warp instructions that a multiprocessor issues in a cycle, one from each of its partitions
CLOCK = 1.755e9  # Hz
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor, and what a warp is given them in
WARPS, BLOCKS, WARP = 64, 32, 32  # at most, of a multiprocessor; threads
SHARED, SHARED_LEAST = 228 * 1024, 1024  # bytes of a multiprocessor; what a block takes for the system alone


class Gpu(NamedTuple):
    """A GPU's assumed bandwidth, of reading and writing together."""

    name: str
    peak: float  # bytes a second, by the data sheet
    copy: float  # what a copy of large tensors is assumed to reach


GPUS = (Gpu("H100", 3.35e12, 3.0e12), Gpu("H200", 4.8e12, 4.3e12))


class Estimate(NamedTuple):
    """The times of a launch in microseconds if memory, and if the instructions' issue, were all that it waits for."""

    memory: float
    issue: float

    @property
    def time(self) -> float:
        """The longer of the two."""
        return max(self)

    @property
    def bound(self) -> str:
        """What the launch waits for."""
        return "memory" if self.memory >= self.issue else "issue"

    @property
    def issue_share(self) -> float:
        """The share of the issue slots that are used."""
        return self.issue / self.time


def estimate(gpu: Gpu, moved: int, warps: float, instructions: int) -> Estimate:
    """Estimate a launch that moves bytes and has warps of so many instructions each."""
    slots = MULTIPROCESSORS * ISSUES * CLOCK
    return Estimate(moved / gpu.copy * 1e6, warps * instructions / slots * 1e6)


def blocks(registers: int, shared: int, threads: int) -> int:
    """Return how many blocks a multiprocessor holds; a warp's registers come from one of its four partitions.

    shared is what cuobjdump says, which has the system's part in it if the kernel has one of its own.
    """
    warps = threads // WARP
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // ISSUES // of_warp * ISSUES // warps
    return min(by_registers, SHARED // max(shared, SHARED_LEAST), WARPS // warps, BLOCKS)
