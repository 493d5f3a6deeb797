"""CUDA graphs: a function's launches, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

WARM_UPS = 2
"""Runs before a capture: libraries make their plans and kernels are compiled at the first, autograd's at the second."""


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs on a device."""
    return device.type == "cuda"


class Graph:
    """What a function launched, to be launched again without it: on the same memory, in the same order.

    The function runs a few times before it is captured; what it writes meanwhile, its caller writes anew.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        """Capture a function's launches.

        Raises:
            RuntimeError: the function waits for the device, or does something else that a graph cannot hold.
        """
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            try:
                # Other threads go on with what they do; only this one is captured.
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    function()
            except RuntimeError as error:
                raise RuntimeError(
                    "cuda_graph: the model cannot be captured, mostly because it waits for the GPU (.item(), .cpu(), "
                    "a condition on a tensor's value) or reads pageable memory of the host; expected one that does "
                    f"not, or cuda_graph=False, or 'try' to do without a graph then; got: {error}"
                ) from error

    def replay(self) -> None:
        """Launch all of it, on the current stream."""
        self._graph.replay()


class Graphs:
    """The graphs of one set of buffers, and where the last work on these ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, Graph] = {}
        self._done: torch.cuda.Event | None = None

    def get(self, key: Hashable, function: Callable[[], None], write: Callable[[], None]) -> Graph:
        """A function's graph, captured at the first time; ``write`` fills the buffers for that, and again after it."""
        graph = self._graphs.get(key)
        if graph is None:
            write()
            graph = self._graphs[key] = Graph(function, self._device)
        return graph

    def wait(self) -> None:
        """On the current stream, for work that was left on another."""
        if self._done is not None:
            self._done.wait(torch.cuda.current_stream(self._device))

    def leave(self) -> None:
        """Note where the current stream's work on the buffers ends."""
        if self._device.type == "cuda":
            self._done = torch.cuda.Event() if self._done is None else self._done
            self._done.record(torch.cuda.current_stream(self._device))
