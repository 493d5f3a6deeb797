"""Record what the caller asks for of each step: its sample, its predicted x_0, whether all of it is finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers.table import StepTable


class Trajectory(NamedTuple):
    """The samples on the way from x_T to x_0, as ``Sampler.trajectory`` returns them.

    A table makes one step a model call; where its solver calls the model twice a step, both calls are counted.
    """

    sample: Tensor
    """x_0, shape (batch, ...)."""
    samples: Tensor | None
    """The first sample and the one after each model call, shape (calls + 1, batch, ...); ``None``: not asked for."""
    originals: Tensor | None
    """The x_0 that each model call predicts, shape (calls, batch, ...); ``None``: not asked for."""


class PolicyTrajectory(NamedTuple):
    """What ``Sampler.trajectory`` returns with ``log_prob``: a ``Trajectory``, and the steps' log-probabilities."""

    sample: Tensor
    """x_0, shape (batch, ...)."""
    samples: Tensor | None
    """As in ``Trajectory``: ``samples[k]`` is what call k began with, and ``samples[k + 1]`` what its step chose."""
    originals: Tensor | None
    """As in ``Trajectory``."""
    log_probs: Tensor
    """Of each call's step, float64 of shape (calls, batch); 0 at calls whose step adds no noise and chooses nothing."""


def check_recorded(samples: bool, originals: bool) -> None:
    """Refuse what does not say whether samples and originals are to be returned."""
    for name, flag in (("samples", samples), ("originals", originals)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


class Recorder:
    """Copies of a run's samples and predicted x_0, and whether they are finite."""

    def __init__(self, sample: Tensor, original: Tensor | None, calls: int, *, samples: bool, finite: bool) -> None:
        """Record the first sample.

        Args:
            sample: the state's buffer.
            original: the state's buffer of the predicted x_0, to be recorded; ``None``: it is not.
            calls: number of model calls to come.
            samples: whether to record the samples.
            finite: whether to record if they are finite.
        """
        self._sample, self._original = sample, original
        self._samples = sample.new_empty(calls + 1, *sample.shape) if samples else None
        self._originals = None if original is None else sample.new_empty(calls, *sample.shape)
        self._finite = torch.ones(calls, dtype=torch.bool, device=sample.device) if finite else None
        if self._samples is not None:
            self._samples[0] = sample

    def after_step(self, number: int) -> None:
        """Record the step of this number, counted from 0; nothing waits for the device."""
        if self._samples is not None:
            self._samples[number + 1] = self._sample
        if self._originals is not None and self._original is not None:
            self._originals[number] = self._original
        if self._finite is not None:
            self._finite[number] = self._sample.isfinite().all()

    def result(self, table: StepTable, begin: int) -> Trajectory:
        """Return copies of all; the table and the first call are for the message about what is not finite."""
        if self._finite is not None and not bool(self._finite.all()):
            step = begin + self._finite.tolist().index(False)
            raise FloatingPointError(
                f"sample: expected finite values, got others after step {step}, timestep {table.host_timesteps[step]}"
            )
        return Trajectory(self._sample.clone(), self._samples, self._originals)
