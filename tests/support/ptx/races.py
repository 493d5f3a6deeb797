"""Finds conflicting accesses that nothing puts in order: two of the same place by different threads, not both reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tests.support.ptx.accesses import SHARED_SPAN
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import GRANULE
from tests.support.ptx.ordering import Ordering
from tests.support.ptx.trace import Access

KINDS = ("read", "constant read", "atomic", "write")
READ, CONSTANT, ATOMIC, WRITE = range(len(KINDS))
Found = tuple[int, int, int, int]
"""An access: its place in the trace, its thread, the number of its kind, and what it writes, as ``Access.same``."""


def races(launch: Launch, limit: int = 5, agreeing: bool = False) -> list[str]:
    """Describe races of a launch, so many at most in global and in shared memory.

    ``agreeing``: warps that write the same bits to a place of shared memory by one instruction are none: it is all the
    same whose are last.
    """
    trace, found, orderings = launch.trace, [], []

    def ordering() -> Ordering:
        if not orderings:
            orderings.append(Ordering(trace, launch.units))
        return orderings[0]

    def shared_name(place: int) -> str:
        return f"byte {place % SHARED_SPAN} of the shared memory of block {place // SHARED_SPAN}"

    for accesses, name in ((trace.accesses, launch.memory.name_of), (trace.shared, shared_name)):
        here: list[str] = []
        for place, group in _conflicting(accesses):
            here += _races_of(group, f"at {name(place)}", ordering, launch.thread_name, agreeing)
            if len(here) >= limit:
                break
        found += here[:limit]
    return found


def _conflicting(accesses: list[Access]) -> Iterator[tuple[int, list[Found]]]:
    """Yield places that one thread writes and another accesses, or a constant read reads, each group of them once."""
    if not any(access.kind in ("write", "atomic") and len(access.places) for access in accesses):
        return
    columns: tuple[list, ...] = ([], [], [], [], [])
    for sequence, kind, places, size, threads, same in accesses:
        for offset in range(0, size, GRANULE):
            shape = len(places)
            written = -1 - threads if same is None else same
            parts = places + offset, threads, np.full(shape, sequence), np.full(shape, KINDS.index(kind)), written
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
    place, thread, sequence, kind, same = (np.concatenate(column) for column in columns)
    order = np.argsort(place, kind="stable")
    place, thread, sequence, kind, same = (column[order] for column in (place, thread, sequence, kind, same))
    begins = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
    ends = np.r_[begins[1:], len(place)]
    written = np.maximum.reduceat(kind, begins) >= ATOMIC
    by_several = np.minimum.reduceat(thread, begins) != np.maximum.reduceat(thread, begins)
    constant = np.maximum.reduceat(kind == CONSTANT, begins)
    seen = set()
    for k in np.flatnonzero(written & (by_several | constant)):
        part = slice(begins[k], ends[k])
        group = frozenset(zip(*(column[part].tolist() for column in (sequence, thread, kind, same)), strict=True))
        if group not in seen:
            seen.add(group)
            yield int(place[begins[k]]), sorted(group)


def _races_of(
    group: list[Found], where: str, ordering: Callable[[], Ordering], name: Callable[[int], str], agreeing: bool
) -> list[str]:
    """Describe one race of each writer with the accesses before and behind it."""
    found = []
    for writer in group:
        if writer[2] not in (WRITE, ATOMIC):
            continue
        for other in group:
            if _in_order(writer, other, ordering) or (agreeing and _agree(writer, other)):
                continue
            kinds = f"{KINDS[writer[2]]} by {name(writer[1])}, and {KINDS[other[2]]} by {name(other[1])}"
            found.append(f"race: {kinds}, {where}")
            break
    return found


def _in_order(writer: Found, other: Found, ordering: Callable[[], Ordering]) -> bool:
    if other[2] == CONSTANT:  # nothing orders them: the memory has to be constant in all of the launch
        return False
    if writer[1] == other[1] or (writer[2] == other[2] == ATOMIC):
        return True
    if other[2] == WRITE and other < writer:  # found from the other side
        return True
    first, second = sorted((writer[:2], other[:2]))
    if ordering().before(first, second):
        return True
    return other[2] == READ and writer[2] == WRITE and ordering().passed_on(other[:2], writer[:2])


def _agree(writer: Found, other: Found) -> bool:
    """Tell whether both write the same bits to the same place by one instruction."""
    return writer[2] == other[2] == WRITE and (writer[0], writer[3]) == (other[0], other[3])
