"""Continuous batching: requests join and leave a batch whose samples are at different steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .._counts import check_count
from ..guidance import Guidance
from ..solvers.table import StepTable
from ..step.memory import counted_layout
from .capture import Graphs, Mode, Pool, check_mode, single_steps
from .conditioning import Condition
from .model_call import ModelOptions
from .request import SampleRequest, make_request
from .state import SamplerState, StateKey, rows_key


@dataclass
class _Active:
    """What a slot is busy with."""

    table: StepTable
    rows_key: Hashable
    skips_uncond: tuple[bool, ...]
    call: int = 0

    @classmethod
    def of(cls, request: SampleRequest) -> _Active:
        return cls(request.table, rows_key(request.guidance), request.skips_uncond)


class Slots:
    """A batch of places for requests, each with its own table, scale, seed and conditions; made by ``Sampler.slots``.

    ``step`` calls the model once for all places and moves each sample on by one model call of its own. A sample does
    not depend on the others in the batch, as far as the model does not mix samples: it gets the bits that ``Sampler``
    gives it in a batch of this size (with ``skip_unconditional``, up to the last digits: a step leaves the
    unconditional prediction out where all requests do). Free places are computed too, and not changed. An interrupted
    step drops all requests. Not thread-safe: use one per thread, and one stream. Image-to-image is a slice of a table,
    or one made with ``begin=``, with an ``x_T`` at its level; masks, callbacks and generators are for ``Sampler``.

    >>> from fastguide import NoiseSchedule, Sampler, ddim
    >>> sampler = Sampler(lambda x, t: 0.1 * x, ddim(NoiseSchedule.linear(), 3))
    >>> slots = sampler.slots(4)
    >>> first, second = slots.admit(torch.randn(1, 2)), slots.admit(torch.randn(1, 2), table=sampler.table[1:])
    >>> [sorted(slots.step()) for _ in range(3)] == [[], [second], [first]]
    True
    """

    def __init__(
        self,
        options: ModelOptions,
        table: StepTable,
        guidance: Guidance | None,
        cuda_graph: Mode,
        batch: int,
        capacity: int,
    ) -> None:
        for name, number in (("batch", batch), ("capacity", capacity)):
            check_count(name, number)
        if options.scalar_timestep:
            raise ValueError("scalar_timestep: expected False, as requests are at different timesteps, got True")
        if cuda_graph == "loop":
            raise ValueError("cuda_graph: expected 'auto', 'try' or False, as requests come and go between steps")
        self._options = options
        self._table = table
        self._guidance = guidance
        self._cuda_graph: Mode = cuda_graph
        self._batch = batch
        self._capacity = capacity
        self._active: dict[int, _Active] = {}
        self._regions: dict[tuple[StepTable, Hashable], int] = {}  # the first row of each table in the buffer
        self._state: SamplerState | None = None
        self._steps: dict[bool, Callable[[], None]] = {}
        self._in_use = threading.Lock()

    @property
    def free(self) -> int:
        """Number of requests that can still be admitted."""
        return self._batch - len(self._active)

    @property
    def active(self) -> tuple[int, ...]:
        """The slots whose requests are not finished."""
        return tuple(sorted(self._active))

    @torch.no_grad()
    def admit(
        self,
        x_T: Tensor,
        *,
        cond: Condition | Sequence[Condition] | None = None,
        uncond: Condition | None = None,
        labels: Tensor | None = None,
        seed: int | None = None,
        table: StepTable | None = None,
        guidance: Guidance | None = None,
    ) -> int:
        """Take in a request between two steps; nothing waits for the device, and nothing is captured again.

        Args:
            x_T: as in ``Sampler``, shape (1, ...): of the shape, dtype and device of the first request's.
            cond, uncond, labels: as in ``Sampler``, for a batch of one; of the first request's shapes.
            seed: of its noise, if its table adds any: the portable stream's.
            table: its model calls; by default the sampler's. A slice of a table starts in its middle.
            guidance: its scale; by default the sampler's, and else of the same kind, for one sample.

        Returns:
            The number of its slot, until ``step`` returns it as finished.

        Raises:
            RuntimeError: no slot is free, or the model cannot be captured.
            TypeError, ValueError: as in ``Sampler``; or the request is of another kind than the first.
        """
        with self._exclusive():
            if not self.free:
                raise RuntimeError(f"admit: expected a free slot, got all {self._batch} under way")
            if not isinstance(x_T, Tensor):
                raise TypeError(f"x_T: expected a tensor, got {type(x_T).__name__}")
            if x_T.dim() == 0 or x_T.shape[0] != 1:
                raise ValueError(f"x_T: expected shape (1, ...), one request, got {tuple(x_T.shape)}")
            seeds = [seed] if isinstance(seed, int) and not isinstance(seed, bool) else None
            request = make_request(
                self._options,
                self._table if table is None else table,
                self._guidance if guidance is None else guidance,
                x_T,
                cond=cond,
                uncond=uncond,
                labels=labels,
                seeds=seeds,
            )
            if seeds is None and (seed is not None or request.table.adds_noise_anywhere):
                raise TypeError(f"seed: expected an integer, as the table adds noise, got {seed!r}")
            if not counted_layout(x_T):
                raise ValueError(f"x_T: expected it contiguous or channels_last, got strides {x_T.stride()}")
            return self._take(request)

    def _take(self, request: SampleRequest) -> int:
        """Write a request to a free slot; if it is refused, nothing has changed."""
        state, steps = self._state_for(request)
        row = self._region(state, request)
        self._state, self._steps = state, steps
        slot = next(number for number in range(self._batch) if number not in self._active)
        state.load_slot(request, slot, row)
        self._active[slot] = _Active.of(request)
        return slot

    @torch.no_grad()
    def step(self) -> dict[int, Tensor]:
        """Move every request on by one model call.

        Returns:
            The finished ones by their slots, which are free again: x_0, shape (1, ...).
        """
        with self._exclusive():
            state, active = self._state, self._active
            if state is None or not active:
                return {}
            self._active = {}  # if this is interrupted, nobody knows at which call they are
            try:
                self._steps[all(request.skips_uncond[request.call] for request in active.values())]()
            except BaseException:
                for slot in active:
                    state.cursor.place(slot, 0, 0, 0)
                raise
            finished = {}
            for slot, request in active.items():
                request.call += 1
                if request.call == len(request.table):
                    finished[slot] = state.sample[slot : slot + 1].clone()
                else:
                    self._active[slot] = request
            return finished

    def cancel(self, slot: int) -> Tensor:
        """Take a request out before its end; return its sample as it is, shape (1, ...)."""
        with self._exclusive():
            if self._state is None or not isinstance(slot, int) or slot not in self._active:
                raise ValueError(f"slot: expected one under way, {self.active}, got {slot!r}")
            del self._active[slot]
            self._state.cursor.place(slot, 0, 0, 0)
            return self._state.sample[slot : slot + 1].clone()

    def clear(self) -> None:
        """Drop all requests and buffers: the next request may be of another kind."""
        with self._exclusive():
            self._active, self._regions, self._state, self._steps = {}, {}, None, {}

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("slots: are in use already, in another thread or by the model; expected some of its own")
        try:
            yield
        finally:
            self._in_use.release()

    # ---- The state, and where each table's rows are in it ----

    def _state_for(self, request: SampleRequest) -> tuple[SamplerState, dict[bool, Callable[[], None]]]:
        """Return the state and its steps, made for the first request; refuse requests of another key."""
        key = StateKey.of(self._options, request, slots=(self._batch, self._capacity))
        if self._state is None:
            check_mode(self._cuda_graph, key.device)
            state = SamplerState(key, request.guidance)
            # A capture runs the step a few times, so it is done now, while no request can be moved on by that.
            return state, single_steps(self._cuda_graph, state, Graphs(Pool(key.device), 2), lambda: None)
        if key.history_slots < self._state.key.history_slots:  # a table may leave some unused
            key = key._replace(history_slots=self._state.key.history_slots)
        if self._state.key.staged:  # an input that is not scaled is the sample times 1
            key = key._replace(staged=True)
        if self._state.key != key:
            raise ValueError(f"admit: expected a request like the first, of {self._state.key.difference(key)}")
        return self._state, self._steps

    def _region(self, state: SamplerState, request: SampleRequest) -> int:
        """Return the first row of the request's table in the buffer, written now if none is in it."""
        table, key = request.table, rows_key(request.guidance)
        if (table, key) not in self._regions:
            room = self._room(len(table))
            if room is None:  # drop the tables that no active request uses
                in_use = {(active.table, active.rows_key) for active in self._active.values()}
                self._regions = {used: begin for used, begin in self._regions.items() if used in in_use}
                room = self._room(len(table))
            if room is None:
                used_rows = sum(len(used) for used, _ in self._regions)
                raise ValueError(
                    f"table: expected at most {self._capacity} rows of all tables under way, got {len(table)} besides "
                    f"{used_rows}; slots(capacity=) sets how many"
                )
            state.write_rows(room, table, request.guidance)
            self._regions[table, key] = room
        return self._regions[table, key]

    def _room(self, rows: int) -> int | None:
        """Return the start of the first gap of at least that number of rows; None if there is no such gap."""
        begin = 0
        for (table, _), first in sorted(self._regions.items(), key=lambda region: region[1]):
            if first - begin >= rows:
                return begin
            begin = first + len(table)
        return begin if self._capacity - begin >= rows else None
