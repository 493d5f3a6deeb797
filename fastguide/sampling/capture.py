"""CUDA graphs: a function's launches, captured once and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM_UPS = 2
"""Runs before a capture: libraries make their plans and kernels are compiled at the first, autograd's at the second."""


_capturing = threading.RLock()  # a process captures one graph at a time
_failed: list[torch.cuda.CUDAGraph] = []  # the allocator goes on pointing to them


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs on a device."""
    return device.type == "cuda"


class Graph:
    """What a function launched, to be launched again without it: on the same memory, in the same order.

    The function runs a few times before it is captured; what it writes meanwhile, its caller writes anew.
    """

    def __init__(self, function: Callable[[], None], pool: Pool) -> None:
        """Capture a function's launches.

        Raises:
            RuntimeError: the function waits for the device, or does something else that a graph cannot hold.
        """
        self._graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(pool.device), _without_cached_casts():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # around the capture too: one that fails does not leave its stream
                for _ in range(WARM_UPS):
                    function()
                try:
                    # Other threads go on with what they do; only this one is captured.
                    with torch.cuda.graph(
                        self._graph, pool=pool.handle, stream=side, capture_error_mode="thread_local"
                    ):
                        function()
                except RuntimeError as error:
                    _failed.append(self._graph)
                    raise RuntimeError(
                        "cuda_graph: the model cannot be captured, mostly because it waits for the GPU (.item(), "
                        ".cpu(), a condition on a tensor's value) or reads pageable memory of the host; expected one "
                        f"that does not, or cuda_graph=False, or 'try' to do without a graph then; got: {error}"
                    ) from error
            torch.cuda.current_stream().wait_stream(side)

    def replay(self) -> None:
        """Launch all of it, on the current stream."""
        self._graph.replay()


class Pool:
    """The memory of graphs that never run at once, and where their last work ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Any = None
        self._done: torch.cuda.Event | None = None

    @property
    def handle(self) -> Any:
        """For captures: what one graph needs while it runs, the next one takes again."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def wait(self) -> None:
        """On the current stream, for work that was left on another."""
        if self._done is not None:
            self._done.wait(torch.cuda.current_stream(self.device))

    def leave(self) -> None:
        """Note where the current stream's work ends."""
        if self.device.type == "cuda":
            self._done = torch.cuda.Event() if self._done is None else self._done
            self._done.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Wait for the last work: its buffers are to be given back, on whatever stream they are taken next."""
        if self._done is not None:
            self._done.synchronize()


class Graphs:
    """The graphs on one set of buffers.

    ``most``: how many are kept, the least recently used dropped; ``only_one``: that of the first run is the only one.
    """

    def __init__(self, pool: Pool, most: int, only_one: bool = False) -> None:
        self._pool = pool
        self._most, self._only_one = most, only_one
        self._graphs: dict[Hashable, Graph] = {}
        self.failed = False

    def get(self, key: Hashable, function: Callable[[], None], write: Callable[[], None]) -> Graph:
        """A function's graph, captured at the first time; ``write`` fills the buffers for that, and again after it."""
        graph = self._graphs.pop(key, None)
        if graph is None:
            if self._only_one and self._graphs:
                raise ValueError("recapture: expected the steps of the first call, which are captured as one graph")
            write()
            try:
                graph = Graph(function, self._pool)
            except RuntimeError:
                self.failed = True
                raise
            while len(self._graphs) >= self._most:
                self._pool.finish()
                self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph
        return graph


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """autocast keeps weights that it has cast until its block ends; a graph would read them for ever."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
