"""What the calls of a solver leave for later ones: a few tensors like the sample, which steps read and write."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from ..solvers.table import StepTable
from .cursor import Cursor
from .memory import empty_strided, same_layout

_GRAIN = 32768
"""What has more elements, torch shares among threads, which may take longer to wake up than a few slots of that size
take to be filled: so these are filled one by one."""


class History:
    """The entries that earlier calls of a loop have written, one slot after the other.

    A table's rows say what each call reads and writes: multistep methods, such as those of Adams and Bashforth, go on
    from predictions of earlier calls. Make one for each loop, and give it to each of its steps; ``Sampler`` does both.
    Steps whose index is an int have to follow each other, or begin again at 0; those of a tensor or of a ``Cursor``,
    which only the device knows, are not checked. The slots begin as zeros.

    Args:
        table: says how many slots there are: ``table.history_slots``.
        sample: the loop's sample, whose shape, layout and device the slots have. They are float32, or float64 if it is.

    >>> from fastguide import NoiseSchedule, StepTable, guided_step
    >>> double = lambda *values: torch.tensor(values, dtype=torch.float64)
    >>> columns = {"x0_scale": double(1, 1), "x0_pred": double(1, 1), "out_sample": double(1, 1)}
    >>> columns |= {"out_x0": double(1, 1.5), "out_hist_0": double(0, -0.5)}
    >>> columns |= {"hist_slot": double(0, 0), "hist_x0": double(1, 1)}
    >>> table = StepTable.from_columns(torch.tensor([1, 0]), columns, name="two steps of Adams-Bashforth")
    >>> x = torch.zeros(1, 3)
    >>> history = History(table, x)
    >>> for index, slope in enumerate((1.0, 3.0)):
    ...     x = guided_step(table, index, x, torch.full_like(x, slope), history=history)
    >>> x
    tensor([[5., 5., 5.]])
    """

    def __init__(self, table: StepTable, sample: Tensor) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
        if not isinstance(sample, Tensor) or sample.dim() == 0:
            raise TypeError("sample: expected a tensor of shape (batch, ...)")
        self.slots = table.history_slots
        self.dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        inner = sample[:1].numel()
        shape = (self.slots * sample.shape[0], *sample.shape[1:])
        with torch.inference_mode(False):  # or only inference mode could write it
            self.entries = empty_strided(shape, (inner, *sample.stride()[1:]), self.dtype, sample.device)
            by_slots = sample.is_cpu and self.entries.numel() > _GRAIN
            for part in self.entries.split(max(sample.shape[0], 1)) if by_slots else (self.entries,):
                part.zero_()
        self._next: int | None = 0

    def restart(self) -> History:
        """Begin a new loop: the next step is the table's first. What autograd has recorded is left behind."""
        self._next = 0
        if self.entries.requires_grad:
            self.entries = self.entries.detach()
        return self

    def continued(self, entries: Tensor, index: int) -> History:
        """Return one that goes on from these entries with the call of this index, which may write to them."""
        other = copy(self)
        other.entries, other._next = entries, index
        return other

    def note(self, index: int | Tensor | Cursor) -> None:
        """Note that a step was made, whose index the host may know."""
        self._next = index + 1 if isinstance(index, int) else None

    def check_order(self, index: int | Tensor | Cursor) -> None:
        """Refuse a step that does not follow the last one, as far as the host knows."""
        if isinstance(index, int) and self._next is not None and index not in (self._next, 0):
            raise ValueError(f"index: expected {self._next}, the call after the last one of this history, got {index}")

    def __repr__(self) -> str:
        return f"History({self.slots} slots, {tuple(self.entries.shape[1:])}, {self.dtype}, {self.entries.device})"


def entries_of(history: History | None) -> Tensor | None:
    """Return what a step is given of a history: nothing where it has no slots."""
    return history.entries if isinstance(history, History) and history.slots else None


def history_follows(history: History, index: int | Tensor | Cursor) -> bool:
    """Whether a step is the one after the last, as far as the host knows; otherwise the checks say what is wrong."""
    return type(history) is History and (type(index) is not int or history._next is None or index in (history._next, 0))


def check_history(history: History | None, table: StepTable, index: int | Tensor | Cursor, sample: Tensor) -> None:
    """Refuse a history that is missing, or was made for another table, sample or call."""
    if history is None:
        raise ValueError(f"history: expected a History, as {table.name} goes on from earlier calls, got None")
    if not isinstance(history, History):
        raise TypeError(f"history: expected a History, got {type(history).__name__}")
    if history.slots != table.history_slots:
        raise ValueError(f"history: expected {table.history_slots} slots for this {table.name}, got {history.slots}")
    entries, shape = history.entries, (history.slots * sample.shape[0], *sample.shape[1:])
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    if entries.shape != shape or not same_layout(entries, sample):
        raise ValueError(
            f"history: expected one for samples of shape {tuple(sample.shape)} and strides {sample.stride()}, got "
            f"{history.slots} slots of {tuple(entries.shape)} in all and strides {entries.stride()}"
        )
    if entries.dtype != dtype:
        raise TypeError(f"history: expected {dtype} for a sample of {sample.dtype}, got {entries.dtype}")
    if entries.device != sample.device:
        raise ValueError(f"history: expected it on {sample.device}, the sample's device, got {entries.device}")
    if not torch.compiler.is_compiling():  # its count, read there, would stay the first one
        history.check_order(index)
