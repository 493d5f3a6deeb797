"""Evict the CPU's caches before each timed call, and return the memory that other contenders have freed."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_SECOND_LEVEL = 2**21  # bytes per thread: no processor has a larger second-level cache
_SMALL = _SECOND_LEVEL // 2  # bytes per thread of a step that fits in the second-level cache
_LAST_LEVEL, _LARGEST = 2**25, 2**29  # bytes: the last level where the system does not tell, and the most to read
_FRESH = 2**25  # bytes of a tensor for which the allocator asks the system, unless it has freed memory

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def cold_caches(step_bytes: int, output_bytes: int) -> Callable[[Callable[[], object]], None]:
    """Return what to do before each timed call of a step.

    A model that runs between two steps fills the second-level caches with its own data, and so does this. It only
    reads: data that it wrote would have to leave the caches while the step is timed. For a larger step it fills the
    last level too, whose contents would otherwise depend on the previous contender and on other processes. If the
    output is large, freed memory goes back to the system and the step is called once, so that the timed call finds
    the memory that it freed itself, and none that others freed.

    Args:
        step_bytes: the bytes that the step moves.
        output_bytes: the bytes of the tensor that it may return.

    Returns:
        A function that takes the step.
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
    """Return the bytes of the processor's largest cache if Linux tells, and 32 MB otherwise."""
    found = [_LAST_LEVEL]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        if text.endswith("K"):
            found.append(int(text[:-1]) * 1024)
    return max(found)
