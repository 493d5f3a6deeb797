"""Run steps eagerly, as replays of one step that was captured as a CUDA graph, or as one graph of all steps."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakSet

import torch

from .state import SamplerState

Mode: TypeAlias = Literal["auto", "loop", "try", False]
"""``cuda_graph`` of ``Sampler``."""
MODES = get_args(Mode)

WARM_UPS = 2
"""Runs before a capture: libraries make their plans and kernels are compiled at the first, autograd's at the second."""


_LEAVES_CAPTURES_OPEN = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)
_capturing = threading.RLock()  # a process captures one graph at a time
_failed: list[torch.cuda.CUDAGraph] = []  # keep failed graphs alive: the allocator still refers to them


def can_capture(device: torch.device) -> bool:
    """Tell whether a device has graphs."""
    return device.type == "cuda"


def check_mode(mode: Mode, device: torch.device) -> None:
    """Refuse what only a device with graphs can do."""
    if mode not in MODES:
        raise ValueError(f"cuda_graph: expected 'auto', 'loop', 'try' or False, got {mode!r}")
    if mode == "loop" and not can_capture(device):
        raise ValueError(f"cuda_graph: expected 'auto' or False for an x_T on {device}, which has no graphs")


def check_between_steps(mode: Mode, calls: range, between_steps: bool) -> None:
    """Refuse to let the host act between the steps where all of them are one graph."""
    if mode == "loop" and calls and between_steps:
        raise ValueError(
            "cuda_graph: 'loop' replays all steps at once; expected 'auto' with a callback, progress, a check, "
            "the results of every step or a generator that the kernel does not draw from"
        )


# ---- Graphs ----


class Graph:
    """Capture what a function launches, and launch it again without the function: the same memory, the same order.

    The function runs a few times before it is captured; the caller restores what it writes meanwhile.
    """

    def __init__(self, function: Callable[[], None], pool: Pool) -> None:
        """Capture a function's launches.

        Raises:
            RuntimeError: the function waits for the device, or does something else that a graph cannot hold.
            torch.OutOfMemoryError: of the function, as it is.
        """
        self._graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(pool.device), _without_cached_casts():
            side = pool.side_stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # around the capture too: one that fails does not leave its stream
                for _ in range(WARM_UPS):
                    function()
                self._capture(function, pool)
            torch.cuda.current_stream().wait_stream(side)
        pool.graphs.add(self)

    def _capture(self, function: Callable[[], None], pool: Pool) -> None:
        raised: RuntimeError | None = None
        try:
            # Other threads may use the GPU meanwhile; only this one is captured.
            with torch.cuda.graph(
                self._graph, pool=pool.handle, stream=pool.side_stream, capture_error_mode="thread_local"
            ):
                try:
                    function()
                except RuntimeError as error:
                    raised = error
                    raise
        except RuntimeError as error:
            if error is not raised:  # the end of the capture has failed, perhaps after the function
                _failed.append(self._graph)
                pool.abandon()
            cause = raised or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise RuntimeError(
                "cuda_graph: the model cannot be captured, mostly because it waits for the GPU (.item(), .cpu(), a "
                "condition on a tensor's value) or reads pageable memory of the host; expected one that does not, or "
                f"cuda_graph=False, or 'try' to do without a graph then; got: {cause}"
            ) from error

    def replay(self) -> None:
        """Launch all that was captured, on the current stream."""
        self._graph.replay()


class Pool:
    """The memory shared by graphs that never run at the same time, and an event at the end of their last work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: WeakSet[Graph] = WeakSet()
        """Those that hold the memory."""
        self._handle: Any = None
        self._side_stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    @property
    def handle(self) -> Any:
        """The memory pool to capture with: what one graph needs while it runs, the next one reuses."""
        if self._handle is None or not self.graphs:  # torch does not begin again with memory that no graph holds
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    @property
    def side_stream(self) -> torch.cuda.Stream:
        """The stream to capture on: torch's allocator gives memory that was freed to the same stream alone."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self.device)
        return self._side_stream

    def abandon(self) -> None:
        """Leave the memory to a capture that has failed, and capture the next one elsewhere.

        torch 2.10 and 2.11 throw at the end of such a capture before they have ended anything: the allocator goes on
        giving out the pool's memory, and torch's default generator refuses to draw outside of captures, until one
        succeeds. So the allocator's part is ended here, and a small capture is made that succeeds.
        """
        handle, self._handle = self._handle, None
        if not _LEAVES_CAPTURES_OPEN or handle is None:
            return
        index = torch.cuda.current_device()
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):  # a capture that failed elsewhere has ended this
                end(index, handle)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.side_stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self.device)

    def wait(self) -> None:
        """Let the current stream wait for the last work, which may be on another stream."""
        if self._done is not None:
            self._done.wait(torch.cuda.current_stream(self.device))

    def mark_end(self) -> None:
        """Mark the end of the current stream's work."""
        if self.device.type == "cuda":
            self._done = torch.cuda.Event() if self._done is None else self._done
            self._done.record(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Let the host wait for the last work, before its buffers are freed and reused on any stream."""
        if self._done is not None:
            self._done.synchronize()


class Graphs:
    """The graphs on one state's buffers."""

    def __init__(self, pool: Pool, limit: int, only_one: bool = False) -> None:
        """Start without graphs.

        Args:
            pool: their memory.
            limit: how many are cached; the least recently used is dropped.
            only_one: whether a second one is refused.
        """
        self._pool = pool
        self._limit, self._only_one = limit, only_one
        self._graphs: dict[Hashable, Graph] = {}
        self.failed = False

    def get(self, key: Hashable, function: Callable[[], None], load: Callable[[], None]) -> Graph:
        """Return a function's graph, captured now if it is not cached.

        ``load`` fills the buffers for the capture, which leaves them spoiled: the caller loads them again.
        """
        graph = self._graphs.pop(key, None)
        if graph is None:
            if self._only_one and self._graphs:
                raise ValueError("recapture: expected the steps of the first call, which are captured as one graph")
            load()
            try:
                graph = Graph(function, self._pool)
            except RuntimeError:
                self.failed = True
                raise
            while len(self._graphs) >= self._limit:
                self._pool.synchronize()
                self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph
        return graph


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Turn off autocast's cache of cast weights: its block frees it, while a graph would still read it."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# ---- Steps ----


def step_function(
    mode: Mode,
    state: SamplerState,
    graphs: Graphs,
    load: Callable[[], None],
    skips_uncond: tuple[bool, ...],
    calls: range,
) -> Callable[[int], None]:
    """Return the function that makes the step of a model call; what it replays is captured now, if it is not cached.

    Args:
        mode: ``cuda_graph`` of ``Sampler``.
        state, graphs: the buffers, and the graphs on them.
        load: fills the buffers for the run; to be called again after this, as a capture spoils them.
        skips_uncond: for each call of the table, whether the unconditional prediction is left out.
        calls: the calls of this run.
    """
    if mode == "loop" and calls:
        pattern = tuple(skips_uncond[call] for call in calls)

        def all_steps() -> None:
            for skip in pattern:
                state.step(skip)

        whole = graphs.get(pattern, all_steps, load)
        return lambda call: whole.replay() if call == calls.start else None
    steps = single_steps(mode, state, graphs, load)
    return lambda call: steps[skips_uncond[call]]()


def single_steps(
    mode: Mode, state: SamplerState, graphs: Graphs, load: Callable[[], None]
) -> dict[bool, Callable[[], None]]:
    """Return a step, by whether it leaves the unconditional prediction out; the arguments are ``step_function``'s."""
    flags = (False, True) if state.key.skips_uncond else (False,)
    eager = {skip: partial(state.step, skip) for skip in flags}
    if mode is False or not can_capture(state.key.device) or (mode == "try" and graphs.failed):
        return dict(eager)
    try:
        return {skip: graphs.get(skip, step, load).replay for skip, step in eager.items()}
    except RuntimeError as error:
        if mode != "try":
            raise
        warnings.warn(f"fastguide: running without a graph: {error}", RuntimeWarning, stacklevel=6)
        return dict(eager)
