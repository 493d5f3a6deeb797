"""What a step finds on the CPU: its tensors no longer in the caches, and no memory that another contender has freed."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_SECOND_LEVEL = 2**21  # bytes for each thread: no processor's second level is larger
_SMALL = _SECOND_LEVEL // 2  # bytes for each thread of a step that stays within the second level
_LAST_LEVEL, _LARGEST = 2**25, 2**29  # bytes: where the system does not say, and what is read at most
_FRESH = 2**25  # bytes of a tensor for which the allocator asks the system, if it has nothing left over

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def between(step_bytes: int, output_bytes: int) -> Callable[[Callable[[], object]], None]:
    """What to do with a step that moves so many bytes and may return so many, each time before it is timed.

    A model that runs between two steps fills the second level of the caches with what is its own, and so does this;
    it only reads, as what it wrote would still have to leave the caches while the step is timed. What a larger step
    finds in the last level would depend on who ran before, and on neighbours: that is filled, too. Where an output is
    large, the step finds the memory that a call of its own has freed, and nothing that others have.
    """
    threads = torch.get_num_threads()
    whole = step_bytes > _SMALL * threads
    buffer = _buffer(min(_LARGEST, 3 * last_level() // 2) if whole else 2 * _SECOND_LEVEL * min(threads, 16))
    trim = _malloc_trim if output_bytes >= _FRESH else None

    def before(call: Callable[[], object]) -> None:
        if trim is not None:
            trim(0)
            call()
        buffer.sum()

    return before


@functools.cache
def _buffer(size: int) -> torch.Tensor:
    return torch.zeros(size // 4)


def last_level() -> int:
    """Bytes of the processor's largest cache, where Linux tells."""
    found = [_LAST_LEVEL]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        if text.endswith("K"):
            found.append(int(text[:-1]) * 1024)
    return max(found)
