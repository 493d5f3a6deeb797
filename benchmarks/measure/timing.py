"""Time calls in turns, each from the same state of the caches; on a GPU between events."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Call = Callable[[], object]

_WARM_UPS, _FEWEST = 3, 9
_SLOW, _SLOWEST = 0.1, 1.0  # seconds: a call that takes longer is repeated three times, or twice
_HOST_SECONDS = 0.05  # that one measurement of the host time takes
_CYCLES_PER_SECOND = 2e9  # of a GPU, roughly
_FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any GPU


class Times(NamedTuple):
    """Seconds of one call: the median and the tenths at both ends."""

    median: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Compute them from the seconds of each call."""
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], len(seconds))
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), tenths[0], tenths[-1], len(seconds))

    @property
    def fields(self) -> dict[str, float]:
        """The values under the names that a row of results has."""
        return {"seconds": self.median, "p10": self.low, "p90": self.high, "calls": self.calls}


class Timed(NamedTuple):
    """The times of the calls that ran, and the exceptions of those that raised one, by name."""

    times: dict[str, Times]
    failures: dict[str, Exception]


@torch.no_grad()
def in_turns(
    calls: Mapping[str, Call],
    seconds: float,
    device: torch.device,
    *,
    wall: bool = False,
    before: Callable[[Call], None] | None = None,
) -> Timed:
    """Time each call again and again, in turns of changing order.

    A call that takes more than 0.1 s is timed three times only, and does not use up the time of the others.

    Args:
        calls: the contenders by name.
        seconds: how long to go on, all calls together.
        device: where the calls run.
        wall: also time a GPU's calls by the clock, until the device has finished: for whole loops, host included.
        before: called with each call before it is timed on the CPU. (On a GPU its cache is overwritten instead.)
    """
    failures: dict[str, Exception] = {}
    events = device.type == "cuda" and not wall
    fewest: dict[str, int] = {}
    hosts: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}

    def attempt(name: str, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # any exception of a contender is reported, and the others go on
            failures[name] = error

    def warm_up(name: str) -> None:
        fewest[name] = _fewest(calls[name], device)
        hosts[name] = host_seconds(calls[name], device) if events else 0.0

    def measure(name: str) -> None:
        call = calls[name]
        if before is not None and device.type == "cpu":
            before(call)
        times[name].append(_on_gpu(call, hosts[name]) if events else _by_the_clock(call, device))

    for name in calls:
        attempt(name, lambda name=name: warm_up(name))  # type: ignore[misc]
    end = time.perf_counter() + seconds
    shuffled = random.Random(0)
    while True:
        late = time.perf_counter() >= end
        turn = [n for n in calls if n not in failures]
        turn = [n for n in turn if len(times[n]) < fewest[n] or (not late and fewest[n] == _FEWEST)]
        if not turn:
            break
        shuffled.shuffle(turn)  # so that no call always follows the same one
        for name in turn:
            begin = time.perf_counter()
            attempt(name, lambda name=name: measure(name))  # type: ignore[misc]
            if fewest[name] != _FEWEST:  # a slow call does not use up the time of the others
                end += time.perf_counter() - begin
    return Timed({name: Times.of(found) for name, found in times.items() if name not in failures}, failures)


def _fewest(call: Call, device: torch.device) -> int:
    """Warm a call up, and return how often to time it at least."""
    call()
    last = _by_the_clock(call, device)
    if last > _SLOW:
        return 3 if last < _SLOWEST else 2
    for _ in range(_WARM_UPS - 2):
        call()
    return _FEWEST


def _by_the_clock(call: Call, device: torch.device) -> float:
    """Return the seconds until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _on_gpu(call: Call, host: float) -> float:
    """Return the seconds between two events, after the device's cache has been overwritten.

    The device is kept busy until the host has launched everything, as a model keeps it busy. This cannot hide the host
    time of a contender that waits for the device in between: its time includes it.
    """
    occupy(host)
    begin = Stamp()
    call()
    return Stamp() - begin


def occupy(host: float) -> None:
    """Overwrite the GPU's cache, and keep the GPU busy for longer than the ``host`` seconds of a call."""
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(int(_CYCLES_PER_SECOND * 1.5 * host))


class Stamp:
    """A moment in the current GPU's stream. The difference of two is in seconds, and waits for the later one."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Stamp) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


@torch.no_grad()
def in_a_graph(call: Call, repeats: int, replays: int = 11) -> float:
    """Return the median GPU seconds of a call among ``repeats`` in a captured graph, which is launched as a whole."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    found = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1e3 / repeats)
    return statistics.median(found[1:])


@torch.no_grad()
def host_seconds(call: Call, device: torch.device) -> float:
    """Return the median seconds until a call returns; on a GPU of few calls at a time, so that no queue is full."""
    calls = max(1, min(20, int(_HOST_SECONDS / max(_by_the_clock(call, device), 1e-9))))
    found = []
    for _ in range(9):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) / calls)
    return statistics.median(found)


def describe(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
