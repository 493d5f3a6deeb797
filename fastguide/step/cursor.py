"""The step index of each sample, on the device, so that one captured step is right at every replay."""

from __future__ import annotations

import torch
from torch import Tensor

from .._counts import is_integer
from ..solvers.table import StepTable

CURSOR_COLUMNS = ("index", "end", "first", "readers")
"""The columns of ``Cursor.state``; csrc/kernels/cursor.h has the same."""

TIMESTEP_DTYPES = (torch.int64, torch.float32)


class Cursor:
    """The step index of a loop on the device: ``guided_step(table, cursor, ...)`` reads it and advances it.

    The step then also writes the timestep of the next model call, so that a loop over model and step has nothing else
    to launch, and can be captured once and replayed. Finished samples are left as they are. Like a generator, it
    serves one stream of work at a time.

    Args:
        batch: the number of samples that each have a position; ``None``: one position for all.
        timesteps: how many timesteps to keep: as many as the model takes, a multiple of the batch; ``None``: one, 0-d.
        timestep_dtype: int64, or float32 for models and tables of real timesteps.
        device: that of the table and the samples.

    >>> from fastguide import NoiseSchedule, ddim, guided_step
    >>> table, x = ddim(NoiseSchedule.linear(), 5), torch.randn(2, 4)
    >>> cursor = Cursor(timesteps=2).start(table)
    >>> for _ in range(len(table)):
    ...     x = guided_step(table, cursor, x, 0.1 * x * cursor.timestep[:, None], out=x)
    >>> cursor
    Cursor(device=cpu)
    """

    def __init__(
        self,
        batch: int | None = None,
        *,
        timesteps: int | None = None,
        timestep_dtype: torch.dtype = torch.int64,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number, least in (("batch", batch, 1), ("timesteps", timesteps, 0)):
            if number is not None and (not is_integer(number) or number < least):
                raise ValueError(f"{name}: expected an integer from {least} on or None, got {number!r}")
        if batch is not None and (timesteps or batch) % batch:
            raise ValueError(f"timesteps: expected a multiple of the batch of {batch}, got {timesteps}")
        if timestep_dtype not in TIMESTEP_DTYPES:
            raise TypeError(f"timestep_dtype: expected one of {TIMESTEP_DTYPES}, got {timestep_dtype}")
        if batch is not None and timesteps is None:
            timesteps = batch
        self.batch = batch
        with torch.inference_mode(False):  # or only inference mode could move it on
            self._state = torch.zeros(batch or 1, len(CURSOR_COLUMNS), dtype=torch.int64, device=device)
            self._timestep = torch.zeros(() if timesteps is None else timesteps, dtype=timestep_dtype, device=device)
        self.device = self._state.device

    # Graphs and repeated steps hold these two: they are written to, and never replaced

    @property
    def state(self) -> Tensor:
        """Where each sample is, of shape (batch or 1, 4)."""
        return self._state

    @property
    def timestep(self) -> Tensor:
        """The timesteps of the next model call."""
        return self._timestep

    def start(self, table: StepTable, begin: int = 0, end: int | None = None) -> Cursor:
        """Put all samples at step ``begin`` of a table, to be finished at ``end``; nothing waits for the device.

        The portable noise counts steps from ``begin``.
        """
        if not isinstance(table, StepTable):
            raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
        if table.timesteps.is_floating_point() and not self.timestep.is_floating_point():
            raise ValueError("timestep_dtype: expected torch.float32 for a table of real timesteps, got torch.int64")
        end = len(table) if end is None else end
        _check_integers(begin=begin, end=end)
        if not 0 <= begin <= end <= len(table):
            raise ValueError(f"begin, end: expected 0 <= begin <= end <= {len(table)}, got {begin} and {end}")
        for column, value in enumerate((begin, end, begin, 0)):
            self.state[:, column] = value
        if begin < len(table):
            self.timestep.fill_(table.host_timesteps[begin])
        return self

    def place(self, sample: int, begin: int, end: int, timestep: float) -> Cursor:
        """Put one sample at row ``begin``, to be finished at ``end``, with the timestep of its next model call."""
        if self.batch is None or not 0 <= sample < self.batch:
            if self.batch is None:
                raise ValueError("sample: expected a Cursor for several samples, Cursor(batch), got one for all")
            raise ValueError(f"sample: expected 0 to {self.batch - 1}, got {sample}")
        _check_integers(begin=begin, end=end)
        if not 0 <= begin <= end:
            raise ValueError(f"begin, end: expected 0 <= begin <= end, got {begin} and {end}")
        if not self.timestep.is_floating_point() and timestep != int(timestep):
            raise ValueError(f"timestep: expected a whole number for a Cursor of int64 timesteps, got {timestep}")
        for column, value in enumerate((begin, end, begin)):
            self.state[sample, column].fill_(value)  # an assignment would wait for a GPU
        self.timestep[sample :: self.batch] = timestep
        return self

    def __repr__(self) -> str:
        return f"Cursor({'' if self.batch is None else f'batch={self.batch}, '}device={self.device})"


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not is_integer(number):
            raise TypeError(f"{name}: expected an integer, got {number!r}")
