"""What a run's steps add up for guidance with momentum, in buffers that its graphs read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.momentum import AddedUp
from ..solvers.table import ROW_COLUMNS, StepTable
from ..step.backends.registry import StepFunction
from ..step.cursor import Cursor
from ..step.memory import in_layout_of
from ..step.momentum import SHIFT, rows_at, sums_like, updates_of
from ..step.operator import StepArguments


class MomentumBuffers:
    """The sums of the predictions' differences, one for each sample, and the rows by which they are moved on.

    Args:
        kind: of the guidance.
        step: a backend's.
        sample: of the run, whose shape, layout and device the sums have.
        cursor: which row each sample is at.
        capacity: number of rows.
    """

    def __init__(self, kind: AddedUp, step: StepFunction, sample: Tensor, cursor: Cursor, capacity: int) -> None:
        self._kind, self._step, self._sample = kind, step, sample
        self._sums = sums_like(sample)
        dtype = self._sums.dtype
        rows = torch.zeros(capacity + 1, len(ROW_COLUMNS), dtype=dtype, device=sample.device)  # finished: one further
        self._arguments = StepArguments(
            out=self._sums,
            original=None,
            staged=None,
            sample=self._sums,
            predictions=[],
            rows=rows,
            weights=SHIFT.weights(sample.device, dtype),
            index=0,
            indices=rows_at(cursor.state, cursor.batch is not None),
            gradient=None,
            variance=None,
            noise=None,
        )

    def write_rows(self, begin: int, table: StepTable, guidance: Guidance) -> None:
        """Write the rows for a table and its guidance, from row ``begin`` on."""
        rows = self._arguments.rows
        updates = updates_of(table, guidance).to(rows.device).device_rows(None, rows.dtype)
        rows[begin : begin + len(table)].copy_(updates[:-1])

    def restart(self, samples: slice) -> None:
        """Begin anew with some samples."""
        self._sums[samples].zero_()

    def terms(self, predictions: Sequence[Tensor]) -> list[Tensor]:
        """Add up the difference of two predictions, and return what the weights are of."""
        self._step(*self._arguments._replace(predictions=list(predictions)))
        return [in_layout_of(self._sample, term) for term in self._kind.terms(self._sums, predictions)]
