"""Call the model for the predictions of all conditions: on one batch that holds them all, or once for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers.table import StepTable
from ..step.memory import DTYPES, in_layout_of
from . import conditioning as conditioning
from .conditioning import Condition
from .distributed.dimension import Dimension


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it is called, as ``Sampler`` describes it."""

    model: Callable[..., Tensor]
    dtype: torch.dtype | None
    backend: str | None
    batched: bool
    skip_unconditional: bool
    timestep_dtype: torch.dtype | None
    scalar_timestep: bool
    guidance_ranks: Dimension | None = None
    """Those that share the predictions of a step; ``None``: this process makes them all."""

    @property
    def settings(self) -> str:
        """How the model is called, as text: of all but the model and the ranks."""
        left_out = ("model", "guidance_ranks")
        return ", ".join(
            f"{each.name}={getattr(self, each.name)}" for each in fields(self) if each.name not in left_out
        )

    def own_predictions(self, num_predictions: int) -> range:
        """Return which of a guidance's predictions this process calls the model for."""
        ranks = self.guidance_ranks
        return range(num_predictions) if ranks is None else ranks.part_of(num_predictions)

    def told_in(self, table: StepTable) -> torch.dtype:
        """Return the dtype of the model's timesteps."""
        if self.timestep_dtype is not None:
            return self.timestep_dtype
        return torch.float32 if table.timesteps.is_floating_point() else torch.int64


class ModelInput(NamedTuple):
    """What one call passes to the model, always in the same memory."""

    x: Tensor
    timestep: Tensor
    condition: Condition | None
    num_predictions: int


class ModelCall:
    """Call the model once a step, or once a prediction; return the predictions in the sample's layout.

    A subclass may call it elsewhere, or in parallel: a step needs ``__call__`` alone.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        sample: Tensor,
        x: Tensor,
        timestep: Tensor,
        condition: Condition | None,
        *,
        num_predictions: int,
        batched: bool,
        learned_variance: bool,
    ) -> None:
        """Cut the inputs of each call out of the step's buffers.

        Args:
            model: as in ``Sampler``.
            sample: x_t, shape (batch, ...).
            x: the model's input, (batch, ...), or, if batched, (num_predictions * batch, ...): the same for each.
            timestep: one, of shape (), or one for each row of x.
            condition: of all predictions one after the other, (num_predictions * batch, ...).
            num_predictions: number of predictions.
            batched: whether all predictions are one call.
            learned_variance: whether the model returns a variance after each prediction.
        """
        self._model, self._sample, self._batch = model, sample, sample.shape[0]
        self._learned_variance = learned_variance
        self._step_writes = {tensor.untyped_storage().data_ptr() for tensor in (sample, x) if tensor.numel()}
        self._checked: set[tuple[object, ...]] = set()

        def call(begin: int, end: int) -> ModelInput:
            rows = (end - begin) * self._batch
            part = condition
            if part is not None and end - begin < num_predictions:
                part = conditioning.at(part, slice(begin * self._batch, end * self._batch))
            at = timestep[:rows] if timestep.dim() and rows < len(timestep) else timestep
            return ModelInput(x[:rows] if rows < len(x) else x, at, part, end - begin)

        def calls(first: int) -> list[ModelInput]:
            each = [call(k, k + 1) for k in range(first, num_predictions)]
            return [call(first, num_predictions)] if batched and len(each) > 1 else each

        self._calls = {False: calls(0), True: calls(1)}

    def __call__(self, skip_uncond: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Return the predictions, of which one tensor may hold all along the batch, and the learned variance."""
        calls = self._calls[skip_uncond]
        if len(calls) == 1:
            count = calls[0].num_predictions
            return self._split(self._checked_output(self._output(calls[0]), count), count)
        parts = [self._split(self._checked_output(self._output(call), 1), 1) for call in calls]
        predictions = [prediction for part, _ in parts for prediction in part]
        addresses = [prediction.data_ptr() for prediction in predictions if prediction.numel()]
        if len(set(addresses)) < len(addresses):
            raise ValueError("model: expected new memory at each call with batched=False, got the same twice")
        return predictions, parts[-1][1]

    def _output(self, call: ModelInput) -> Tensor:
        x, timestep, condition, _ = call
        output: Tensor
        if condition is None:
            output = self._model(x, timestep)
        elif isinstance(condition, Mapping):
            output = self._model(x, timestep, **condition)
        else:
            output = self._model(x, timestep, condition)
        return output

    def _checked_output(self, output: Tensor, count: int) -> Tensor:
        """Return the model's output, or a copy if it is in memory that the step writes; refuse what is none."""
        if not isinstance(output, Tensor):
            hint = (
                "; its .sample is one, and fastguide.diffusers.as_model takes it" if hasattr(output, "sample") else ""
            )
            raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}{hint}")
        signature = (count, output.shape, output.dtype, output.device)
        if signature not in self._checked:
            self._check(output, count)
            self._checked.add(signature)
        if output.untyped_storage().data_ptr() in self._step_writes:  # a view of the model's input
            output = output.clone()
        return output

    def _split(self, output: Tensor, count: int) -> tuple[list[Tensor], Tensor | None]:
        """Return the output's predictions, and the learned variance: that of the last, conditional one."""
        sample, batch = self._sample, self._batch
        if not self._learned_variance and output.stride()[1:] == sample.stride()[1:]:
            return [output], None
        parts = [output[k * batch : (k + 1) * batch] for k in range(count)]
        if not self._learned_variance:
            return [in_layout_of(sample, part) for part in parts], None
        channels = sample.shape[1]
        predictions = [in_layout_of(sample, part[:, :channels]) for part in parts]
        return predictions, in_layout_of(sample, parts[-1][:, channels:])

    def _check(self, output: Tensor, count: int) -> None:
        rest = self._sample.shape[1:]
        if self._learned_variance:
            rest = torch.Size((2 * rest[0], *rest[1:]))
        expected = (count * self._batch, *rest)
        if output.shape != expected:
            raise ValueError(f"model: expected it to return shape {expected}, got {tuple(output.shape)}")
        if output.dtype not in DTYPES:
            raise TypeError(f"model: expected it to return floating-point numbers, got {output.dtype}")
        if output.device != self._sample.device:
            raise ValueError(f"model: expected it to return a tensor on {self._sample.device}, got {output.device}")
