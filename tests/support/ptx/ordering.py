"""Which accesses of a launch happen before which others, by PTX's memory model.

Program order, barriers, and synchronisation do that: a release (a fence, then a strong write) before an acquire (a
strong read, then a fence) that observes it, also through updates in between. A strong access happens before all that
follows an access that has observed it. A shuffle orders nothing but a read ahead of it and a write behind it, as a lane
has read what it passes on to another that stores it. (Whether a shuffle passes on just that value is not followed.)

Two tables for each thread hold points in its program: ``ways_in``, where what it did so far is passed on (barriers,
releases), and ``ways_out``, where it learns what others did (barriers, acquires). Points are nodes of a graph, and an
access happens before another if the first way in behind it leads to the last way out ahead of the other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from tests.support.ptx.trace import Order, Strong, Trace
from tests.support.ptx.warps import LANES

Node = Hashable


class Point(NamedTuple):
    """A place in a thread's program, and its node."""

    sequence: int
    node: Node


class Ordering:
    """The order of a launch's accesses."""

    def __init__(self, trace: Trace, units: dict[str, int]) -> None:
        self._units = units
        self._ways_in: dict[int, list[Point]] = defaultdict(list)
        self._ways_out: dict[int, list[Point]] = defaultdict(list)
        self._fences: dict[int, list[int]] = defaultdict(list)
        self._shuffles: dict[int, list[int]] = defaultdict(list)
        self._strong: dict[int, list[Point]] = defaultdict(list)
        self._edges: dict[Node, set[Node]] = defaultdict(set)
        for order in trace.orders:
            self._add_order(order)
        last: dict[int, int] = {}  # of each place: the strong access that wrote it last
        for number, access in enumerate(trace.strong):
            self._add_strong(number, access, last.get(access.place))
            if access.kind != "read":
                last[access.place] = number
        self._connect()
        self._reached = cache(self._all_reached)

    def before(self, first: tuple[int, int], second: tuple[int, int]) -> bool:
        """Whether an access happens before another one of another thread: each its place in the trace, and thread."""
        sequence, thread = second
        ways_out, observed = self._ways_out[thread], self._strong[thread]
        last = bisect_left(ways_out, (sequence,)) - 1
        ends = {ways_out[last].node} if last >= 0 else set()
        starts = set()
        way_in = self._way_in(*reversed(first))
        if way_in is not None:
            starts.add(way_in)
        for point in self._strong[first[1]]:
            if point.sequence == first[0]:
                starts.add(point.node)
                ends |= {other.node for other in observed if other.sequence < sequence}
        return any(not ends.isdisjoint(self._reached(start)) for start in starts)

    def passed_on(self, read: tuple[int, int], write: tuple[int, int]) -> bool:
        """Whether a shuffle of one warp lies behind a read of one of its threads, and ahead of a write of another."""
        (begin, reader), (end, writer) = read, write
        common = set(self._shuffles[reader]) & set(self._shuffles[writer])
        return reader // LANES == writer // LANES and any(begin < sequence < end for sequence in common)

    def _add_order(self, order: Order) -> None:
        for thread in order.threads.tolist():
            if order.kind == "fence":
                self._fences[thread].append(order.sequence)
            elif order.kind == "shuffle":
                self._shuffles[thread].append(order.sequence)
            else:
                point = Point(order.sequence, (order.kind, order.sequence, thread // self._units[order.kind]))
                self._ways_in[thread].append(point)
                self._ways_out[thread].append(point)

    def _add_strong(self, number: int, access: Strong, previous: int | None) -> None:
        """Add a strong access, of a place whose value is that of the access ``previous``."""
        fences = self._fences[access.thread]
        following = bisect_left(fences, access.sequence)
        own, passed_on = ("strong", number), ("value", number)
        self._strong[access.thread].append(Point(access.sequence, own))
        if access.kind != "read" and (access.releases or following > 0):
            begin = access.sequence if access.releases else fences[following - 1]
            self._ways_in[access.thread].append(Point(begin, ("release", number)))
            self._edges["release", number].add(passed_on)
        if access.kind != "write" and previous is not None:
            self._edges["strong", previous].add(own)
            if access.kind == "update":
                self._edges["value", previous].add(passed_on)
            if access.acquires or following < len(fences):
                end = access.sequence if access.acquires else fences[following]
                self._ways_out[access.thread].append(Point(end, ("acquire", number)))
                self._edges["value", previous].add(("acquire", number))

    def _connect(self) -> None:
        for points in (*self._ways_in.values(), *self._ways_out.values()):
            points.sort(key=lambda point: point.sequence)
            for point, following in pairwise(points):
                self._edges[point.node].add(following.node)
        for thread, points in [*self._ways_out.items(), *self._strong.items()]:
            for point in points:
                way_in = self._way_in(thread, point.sequence)
                if way_in is not None:
                    self._edges[point.node].add(way_in)

    def _way_in(self, thread: int, sequence: int) -> Node | None:
        points = self._ways_in[thread]
        first = bisect_left(points, (sequence,))
        return points[first].node if first < len(points) else None

    def _all_reached(self, start: Node) -> frozenset[Node]:
        reached, todo = {start}, [start]
        while todo:
            new = self._edges.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        return frozenset(reached)
