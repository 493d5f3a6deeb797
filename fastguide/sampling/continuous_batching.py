"""Continuous batching: requests join and leave a batch whose samples stand at different steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.weights import UNGUIDED
from ..solvers.table import StepTable
from ..step.guided_step import check_run
from ..step.memory import counted_layout
from ..step.noise import signed_word
from . import conditioning as conditioning
from .capture import Graphs, Pool
from .conditioning import Condition
from .image_to_image import check_rows
from .state import Loop, LoopOptions
from .stepping import Mode, check_mode, single_steps


class _Request:
    """What a slot is busy with."""

    def __init__(self, table: StepTable, guidance: Guidance, conditional: tuple[bool, ...]) -> None:
        self.table = table
        self.form = guidance.form
        self.conditional = conditional
        self.step = 0


class Slots:
    """A batch of places for requests, each with its own table, scale, seed and conditions; made by ``Sampler.slots``.

    A step calls the model once for all places and moves each sample on by one step of its own. A sample does not depend
    on who else is in the batch, as far as the model does not mix samples: it gets the bits that ``Sampler`` gives it in
    a batch of this size (with ``skip_unconditional``, up to the last digits: a step leaves the unconditional prediction
    out where all requests do). Free and finished places are computed along, and left as they are. A step that is
    interrupted gives up all requests. Of one thread and one stream at a time. Image-to-image is a slice of a table,
    with an ``x_T`` at its level; masks, callbacks and generators are ``Sampler``'s alone.

    >>> from fastguide import NoiseSchedule, Sampler, ddim
    >>> sampler = Sampler(lambda x, t: 0.1 * x, ddim(NoiseSchedule.linear(), 3))
    >>> slots = sampler.slots(4)
    >>> first, second = slots.admit(torch.randn(1, 2)), slots.admit(torch.randn(1, 2), table=sampler.table[1:])
    >>> [sorted(slots.step()) for _ in range(3)] == [[], [second], [first]]
    True
    """

    def __init__(
        self,
        options: LoopOptions,
        table: StepTable,
        guidance: Guidance | None,
        cuda_graph: Mode,
        batch: int,
        capacity: int,
    ) -> None:
        for name, number in (("batch", batch), ("capacity", capacity)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name}: expected a positive integer, got {number!r}")
        if options.scalar_timestep:
            raise ValueError("scalar_timestep: expected False, as requests stand at different timesteps, got True")
        if cuda_graph == "loop":
            raise ValueError("cuda_graph: expected 'auto', 'try' or False, as requests come and go between steps")
        self._options = options
        self._table = table
        self._guidance = guidance
        self._cuda_graph: Mode = cuda_graph
        self._batch = batch
        self._capacity = capacity
        self._requests: dict[int, _Request] = {}
        self._regions: dict[tuple[StepTable, str | None], int] = {}  # where a table's rows begin
        self._loop: Loop | None = None
        self._in_use = threading.Lock()
        self._steps: dict[bool, Callable[[], None]] = {}

    @property
    def free(self) -> int:
        """Number of requests that can still be admitted."""
        return self._batch - len(self._requests)

    @property
    def active(self) -> tuple[int, ...]:
        """The slots under way."""
        return tuple(sorted(self._requests))

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
        """Take in a request between two steps; nothing waits for the device, and nothing is captured anew.

        Args:
            x_T: its starting noise, shape (1, ...): of the shape, dtype and device of the first request's.
            cond, uncond, labels: as in ``Sampler``, for a batch of one; of the first request's shapes.
            seed: of its noise, if its table adds any: the portable stream's.
            table: its steps; by default the sampler's. A slice of a table starts in its middle.
            guidance: its scale; by default the sampler's, and else of the same kind, for one sample.

        Returns:
            The number of its slot, until ``step`` returns it as finished.

        Raises:
            RuntimeError: no slot is free, or the model cannot be captured.
            TypeError, ValueError: as in ``Sampler``; or the request is of another kind than the first.
        """
        self._refuse_others()
        with self._in_use:
            if not self.free:
                raise RuntimeError(f"admit: expected a free slot, got all {self._batch} under way")
            table = self._table if table is None else table
            guidance = self._guidance if guidance is None else guidance
            kinds = (("x_T", x_T, Tensor), ("table", table, StepTable), ("guidance", guidance, (Guidance, type(None))))
            for name, value, expected in kinds:
                if not isinstance(value, expected):
                    what = {"x_T": "a tensor", "table": "a StepTable", "guidance": "a Guidance or None"}[name]
                    raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
            if x_T.dim() == 0 or x_T.shape[0] != 1:
                raise ValueError(f"x_T: expected shape (1, ...), one request, got {tuple(x_T.shape)}")
            guidance = UNGUIDED if guidance is None else guidance
            check_run(table, "x_T", x_T, guidance, self._options.backend)
            if not counted_layout(x_T):
                raise ValueError(f"x_T: expected it contiguous or channels_last, got strides {x_T.stride()}")
            check_rows(table, 0)
            conditions = conditioning.listed(cond, uncond, guidance.num_predictions)
            conditioning.check_labels(labels, guidance, 1)
            if (table.adds_noise_anywhere or seed is not None) and (
                not isinstance(seed, int) or isinstance(seed, bool)
            ):
                raise TypeError(f"seed: expected an integer, as the table adds noise, got {seed!r}")
            loop, steps = self._loop_for(
                x_T, conditioning.signature(conditions, 1), table, guidance, labels is not None
            )
            begin = self._region(loop, table, guidance)
            self._loop, self._steps = loop, steps  # kept, now that the request is taken
            slot = next(number for number in range(self._batch) if number not in self._requests)
            place = slice(slot, slot + 1)
            loop.write_weights(begin, place, table, guidance)
            loop.write_conditions(conditions, place)
            loop.sample[place].copy_(x_T)
            if loop.staged is not None:
                loop.staged[slot :: self._batch].copy_(x_T.expand(loop.staged[slot :: self._batch].shape))
            if loop.labels is not None and labels is not None:
                loop.labels[place].copy_(labels)
            if loop.seeds is not None and seed is not None:
                loop.seeds[place].fill_(signed_word(seed))
            loop.cursor.place(slot, begin, begin + len(table), table.host_timesteps[0])
            self._requests[slot] = _Request(table, guidance, self._options.skipped(guidance, len(table)))
            return slot

    @torch.no_grad()
    def step(self) -> dict[int, Tensor]:
        """Move every request on by one step.

        Returns:
            Those that are finished, by their slots, which are free again: x_0, shape (1, ...).
        """
        self._refuse_others()
        with self._in_use:
            loop, requests = self._loop, self._requests
            if loop is None or not requests:
                return {}
            self._requests = {}  # if this is interrupted, nobody knows where they stand
            try:
                self._steps[all(request.conditional[request.step] for request in requests.values())]()
            except BaseException:
                for slot in requests:
                    loop.cursor.place(slot, 0, 0, 0)
                raise
            finished, going_on = {}, {}
            for slot, request in requests.items():
                request.step += 1
                if request.step == len(request.table):
                    finished[slot] = loop.sample[slot : slot + 1].clone()
                else:
                    going_on[slot] = request
            self._requests = going_on
            return finished

    def _refuse_others(self) -> None:
        if self._in_use.locked():
            raise RuntimeError("slots: are in use already, in another thread or by the model; expected some of its own")

    def clear(self) -> None:
        """Give up all requests and buffers: the next request may be of another kind."""
        self._refuse_others()
        with self._in_use:
            self._requests, self._regions, self._loop, self._steps = {}, {}, None, {}

    def cancel(self, slot: int) -> Tensor:
        """Take a request out before its end; returns its sample as it is."""
        self._refuse_others()
        if self._loop is None or not isinstance(slot, int) or slot not in self._requests:
            raise ValueError(f"slot: expected one under way, {self.active}, got {slot!r}")
        with self._in_use:
            del self._requests[slot]
            self._loop.cursor.place(slot, 0, 0, 0)
            return self._loop.sample[slot : slot + 1].clone()

    def _loop_for(
        self, x_T: Tensor, conditions: conditioning.Signature, table: StepTable, guidance: Guidance, labels: bool
    ) -> tuple[Loop, dict[bool, Callable[[], None]]]:
        """The loop and its steps, made for the first request; every other has to be of its kind."""
        kind = self._options.kind(
            x_T,
            conditions,
            table,
            guidance,
            capacity=self._capacity,
            labels=labels,
            noise="portable",
            per_sample=True,
            batch=self._batch,
        )
        if self._loop is None:
            check_mode(self._cuda_graph, x_T.device)
            loop = Loop(kind, guidance)
            # Captured now, as nobody is under way whom a warm-up would move on.
            return loop, single_steps(self._cuda_graph, loop, Graphs(Pool(kind.device), 2), lambda: None)
        if self._loop.kind != kind:
            raise ValueError(f"admit: expected a request like the first, of {self._loop.kind.difference(kind)}")
        return self._loop, self._steps

    def _region(self, loop: Loop, table: StepTable, guidance: Guidance) -> int:
        """Where the table's rows are in the buffer; written now, if they are not there yet."""
        key = (table, guidance.form)
        if key not in self._regions:
            in_use = {(request.table, request.form) for request in self._requests.values()}
            room = self._room(len(table), self._regions)
            if room is None:  # forget the tables that nobody is under way with
                self._regions = {known: begin for known, begin in self._regions.items() if known in in_use}
                room = self._room(len(table), self._regions)
            if room is None:
                used = sum(len(known) for known, _ in self._regions)
                raise ValueError(
                    f"table: expected at most {self._capacity} rows of all tables under way, got {len(table)} besides "
                    f"{used}; slots(capacity=) sets how many"
                )
            loop.write_rows(room, table, guidance)
            self._regions[key] = room
        return self._regions[key]

    def _room(self, rows: int, regions: dict[tuple[StepTable, str | None], int]) -> int | None:
        """The first gap of so many rows."""
        begin = 0
        for (table, _), at in sorted(regions.items(), key=lambda region: region[1]):
            if at - begin >= rows:
                return begin
            begin = at + len(table)
        return begin if self._capacity - begin >= rows else None
