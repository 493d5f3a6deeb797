"""Guidance parallel: each rank calls the model for its own conditions, and all-gathers what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...step.memory import DTYPES
from ..conditioning import Condition
from ..model_call import ModelCall, ModelInput
from .dimension import Dimension

_NO_OUTPUT, _FAILED = -1, -2
_PREDICTIONS = "the predictions of a step"


class _Round(NamedTuple):
    """One all-gather, and the call of the model before it."""

    call: ModelInput | None
    """``None``: this rank has nothing to add."""
    place: int
    """Which of the rank's places in the round the call's first prediction has."""


class GatheredModelCall(ModelCall):
    """Call the model for this rank's predictions, and return those of all ranks, in the order of the weights.

    Ranks that have a prediction less than others send one that nobody reads. Batched, there is one all-gather a step.
    Else there is one after each of a rank's calls, and goes on during its next one. What is sent are the model's
    outputs, in its dtype, into buffers that are made at the first step.
    """

    def __init__(
        self,
        ranks: Dimension,
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
        """Prepare the calls: arguments are those of ``ModelCall``, for this rank's predictions alone, but for two.

        Args:
            ranks: those that share the predictions.
            model, sample, x, timestep, condition, batched, learned_variance: as there.
            num_predictions: of all ranks.

        Raises:
            ValueError: the model has to be called for all predictions at once.
        """
        if getattr(model, "takes_all_predictions", False):
            raise ValueError(
                "model: expected one that can be called for some of the predictions, got one that takes all, such as "
                "that of AutoGuidance.both; give each rank the model for its own predictions"
            )
        self._ranks = ranks
        own = ranks.part_of(num_predictions)
        super().__init__(
            model, sample, x, timestep, condition,
            num_predictions=len(own), batched=batched, learned_variance=learned_variance,
        )  # fmt: skip
        most = len(ranks.part_of(num_predictions, 0))
        self._width = most if batched else 1
        """Predictions of a rank in a round."""
        self._rounds = {
            skip: _rounds(self._calls[skip and own.start == 0], int(skip and own.start == 0), most, batched)
            for skip in (False, True)
        }
        self._places = [
            (0, rank * most + place) if batched else (place, rank)
            for rank in range(ranks.size)
            for place in range(len(ranks.part_of(num_predictions, rank)))
        ]
        """For each prediction, its round and its place in that."""
        self._buffers: _Buffers | None = None

    def __call__(self, skip_uncond: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Return the predictions of all ranks, of which one tensor may hold all, and the learned variance."""
        works: list[Any] = []
        alive: list[Tensor] = []
        for number, (call, place) in enumerate(self._rounds[skip_uncond]):
            output, buffers = self._own_output(call)
            mine = buffers.mine(number, output, place)
            if any(mine.data_ptr() == earlier.data_ptr() for earlier in alive):  # it is under way to the others
                raise ValueError("model: expected new memory at each call with batched=False, got the same twice")
            works.append(self._ranks.begin_all_gather(buffers.gathered[number].view(-1), mine, _PREDICTIONS))
            alive.append(mine)
        for work in works:
            self._ranks.end(work, _PREDICTIONS)
        whole = None if skip_uncond else buffers.whole(len(self._places))
        if whole is not None:
            return self._split(whole, len(self._places))
        parts = [self._split(buffers.at(*where), 1) for where in self._places[int(skip_uncond) :]]
        return [prediction for part, _ in parts for prediction in part], parts[-1][1]

    def _own_output(self, call: ModelInput | None) -> tuple[Tensor | None, _Buffers]:
        """Return the model's output of a call and the buffers, which are made for the first one.

        Of an exception at the first call, memory that is not there among them, the other ranks are told.
        """
        if self._buffers is not None:
            return self._output_of(call), self._buffers
        output, buffers, raised = None, None, None
        try:
            output = self._output_of(call)
            buffers = None if output is None else self._new_buffers(output.dtype)
        except Exception as error:
            raised = error
        dtype = self._agreed_dtype(output, raised)
        self._buffers = self._new_buffers(dtype) if buffers is None else buffers
        return output, self._buffers

    def _output_of(self, call: ModelInput | None) -> Tensor | None:
        return None if call is None else self._checked_output(self._output(call), call.num_predictions)

    def _new_buffers(self, dtype: torch.dtype) -> _Buffers:
        rest = list(self._sample.shape[1:])
        if self._learned_variance:
            rest[0] *= 2
        with torch.inference_mode(False):
            return _Buffers(self._sample, rest, dtype, self._ranks.size, len(self._rounds[False]), self._width)

    def _agreed_dtype(self, output: Tensor | None, raised: Exception | None) -> torch.dtype:
        """Return the dtype of all ranks' outputs; raise on every rank if one of them has none to give."""
        mine = _FAILED if raised is not None else _NO_OUTPUT if output is None else DTYPES.index(output.dtype)
        number = torch.tensor([mine], device=self._sample.device)
        numbers = self._ranks.all_gather(number, "the dtype of the model's first output").tolist()
        names = {number: self._ranks.ranks[at] for at, number in enumerate(numbers) if number != _NO_OUTPUT}
        with self._ranks.none_waiting():
            if raised is not None:
                raise raised
            if _FAILED in names:
                raise RuntimeError(
                    f"model: expected an output on every rank, got an exception on rank {names[_FAILED]}"
                )
            if len(names) > 1:
                got = " and ".join(f"{DTYPES[number]} on rank {rank}" for number, rank in names.items())
                raise TypeError(f"model: expected outputs of one dtype on all ranks, got {got}")
        return DTYPES[next(iter(names))]

    def _checked_output(self, output: Tensor, count: int) -> Tensor:
        output = super()._checked_output(output, count)
        if self._buffers is not None and output.dtype != self._buffers.dtype:
            raise TypeError(f"model: expected {self._buffers.dtype}, as at its first call, got {output.dtype}")
        return output


def _rounds(calls: list[ModelInput], skipped: int, most: int, batched: bool) -> list[_Round]:
    """Return the rounds of a step: one if batched, else one for each of a rank's places."""
    if batched:
        return [_Round(calls[0] if calls else None, skipped)]
    made: list[ModelInput | None] = [None] * skipped + list(calls)
    return [_Round(call, 0) for call in made + [None] * (most - len(made))]


class _Buffers:
    """What is sent and received, with samples in the layout of x_t and one after the other."""

    def __init__(
        self, sample: Tensor, rest: list[int], dtype: torch.dtype, ranks: int, rounds: int, width: int
    ) -> None:
        """Make the buffers for outputs of shape (batch, *rest)."""
        self.dtype = dtype
        self._batch, self._rest, self._strides = sample.shape[0], rest, _strides_like(sample, rest)
        one = self._batch * math.prod(rest)
        self.gathered = torch.zeros(rounds, ranks * width, one, dtype=dtype, device=sample.device)
        """Of each round, the predictions of rank 0, of rank 1, and so on."""
        self._sent = torch.zeros(rounds, width, one, dtype=dtype, device=sample.device)

    def mine(self, number: int, output: Tensor | None, place: int) -> Tensor:
        """Return the memory to send in a round: the output's own, or a copy where it is smaller or lies otherwise."""
        sent = self._sent[number]
        if output is None:
            return sent.view(-1)
        if output.numel() == sent.numel() and output.stride() == self._strides:
            return output.as_strided((sent.numel(),), (1,))
        count = output.shape[0] // max(self._batch, 1)
        self._samples(sent[place : place + count]).copy_(output)
        return sent.view(-1)

    def at(self, number: int, place: int) -> Tensor:
        """Return what came in a round at a place."""
        return self._samples(self.gathered[number, place])

    def whole(self, count: int) -> Tensor | None:
        """Return all of so many predictions as one tensor; ``None`` if they are not one after the other."""
        rounds, places, _ = self.gathered.shape
        return self._samples(self.gathered[0]) if rounds == 1 and places == count else None

    def _samples(self, memory: Tensor) -> Tensor:
        rows = memory.numel() // max(math.prod(self._rest), 1)
        return memory.as_strided((rows, *self._rest), self._strides)


def _strides_like(sample: Tensor, rest: list[int]) -> tuple[int, ...]:
    """Return the strides of samples of shape ``rest`` whose dimensions lie in the order of those of x_t."""
    strides, size = [0] * len(rest), 1
    for dim in sorted(range(len(rest)), key=lambda dim: (sample.stride(dim + 1), -dim)):
        strides[dim] = size
        size *= rest[dim]
    return (size, *strides)
