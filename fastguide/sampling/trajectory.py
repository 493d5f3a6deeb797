"""What is kept of each step of a loop, as it is asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers.table import StepTable
from .state import Loop


class Sampled(NamedTuple):
    """What a loop returns if more than its last sample is asked for.

    ``sample``: x_0, shape (batch, ...). ``trajectory``: x_T and the sample after each step, shape (steps + 1, batch,
    ...), or ``None``. ``originals``: each step's predicted original sample, shape (steps, batch, ...), or ``None``.
    """

    sample: Tensor
    """x_0, shape (batch, ...)."""
    trajectory: Tensor | None
    """x_T and the sample after each step, shape (steps + 1, batch, ...)."""
    originals: Tensor | None
    """The predicted original sample of each step, shape (steps, batch, ...)."""


class Record:
    """What is kept of each step, as it was asked for."""

    def __init__(self, loop: Loop, steps: int, trajectory: bool, originals: bool, finite: bool) -> None:
        self._loop = loop
        sample = loop.sample
        self._trajectory = sample.new_empty(steps + 1, *sample.shape) if trajectory else None
        self._originals = sample.new_empty(steps, *sample.shape) if originals else None
        self._finite = torch.ones(steps, dtype=torch.bool, device=sample.device) if finite else None
        if self._trajectory is not None:
            self._trajectory[0] = sample

    def after(self, number: int) -> None:
        """The step of this number, from 0 on, has been launched."""
        if self._trajectory is not None:
            self._trajectory[number + 1] = self._loop.sample
        if self._originals is not None and self._loop.original is not None:
            self._originals[number] = self._loop.original
        if self._finite is not None:
            self._finite[number] = self._loop.sample.isfinite().all()

    def result(self, table: StepTable, begin: int) -> Tensor | Sampled:
        """What the loop returns; the table and the step at which it began are for messages."""
        if self._finite is not None and not bool(self._finite.all()):
            step = begin + self._finite.tolist().index(False)
            raise FloatingPointError(
                f"sample: expected finite values, got others after step {step}, timestep {table.host_timesteps[step]}"
            )
        sample = self._loop.sample.clone()
        if self._trajectory is None and self._originals is None:
            return sample
        return Sampled(sample, self._trajectory, self._originals)
