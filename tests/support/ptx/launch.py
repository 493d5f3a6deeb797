"""One launch of a kernel: runs its blocks, and keeps what was wrong, what was accessed, and what was executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tests.support.ptx.generate import Code
from tests.support.ptx.memory import Memory
from tests.support.ptx.parse import PtxError
from tests.support.ptx.trace import Trace
from tests.support.ptx.warps import LANES
from tests.support.ptx.wave import Wave

MAX_FINDINGS = 20


class Launch:
    """A launch that is to be run once."""

    def __init__(
        self,
        memory: Memory,
        code: Code,
        blocks: int,
        threads: int,
        parameters: bytes,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        kernel = code.kernel
        if len(parameters) != kernel.parameter_bytes:
            raise PtxError(f"{len(parameters)} bytes of parameters; {kernel.name} has {kernel.parameter_bytes}")
        if threads % LANES or threads > (kernel.max_threads or threads):
            raise PtxError(f"{threads} threads a block; {kernel.name} is for {kernel.max_threads}")
        if blocks % cluster:
            raise PtxError(f"{blocks} blocks in clusters of {cluster}")
        self.memory, self.code, self.blocks, self.threads = memory, code, blocks, threads
        self.units = {"cluster": cluster * threads, "block": threads, "warp": LANES}
        """The number of threads that wait for each other at a barrier of each kind."""
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.shared_bytes = max(kernel.shared_bytes, shared_bytes)
        self.random = np.random.default_rng(blocks)
        self.findings: list[str] = []
        self.trace = Trace()
        self.executed: Counter[int] = Counter()
        """Thread instructions' count by basic block, in threads."""

    def run(self, waves: Sequence[Sequence[int]] | None = None, classes: int = 1) -> Launch:
        """Run all blocks, or these: a wave's side by side, one wave after the other.

        Within a wave all threads go on together, or warps in so many classes, drawn at random: those of one class run
        to a barrier or to their end before those of the next begin.
        """
        with np.errstate(all="ignore"):
            for wave in [range(self.blocks)] if waves is None else waves:
                Wave(self, np.asarray(wave, np.int64), classes).run()
        return self

    def find(self, kind: str, text: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(f"{kind}: {text}")

    def thread_name(self, number: int) -> str:
        return f"thread {number % self.threads} of block {number // self.threads}"

    @property
    def instructions(self) -> int:
        """Return how many instructions all threads have executed."""
        return sum(self.code.sizes[block] * threads for block, threads in self.executed.items())
