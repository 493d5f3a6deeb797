"""Run one step of a loop that a scheduler counts: the kernel's call, and what the loop keeps of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from ..solvers import StepTable
from ..step.guided_step import guided_step
from ..step.memory import empty_like
from .counted_loop import CountedLoop
from .dtypes import Dtypes


class _Outputs(NamedTuple):
    """What a step writes, by which table."""

    table: StepTable
    out: Tensor | None
    """The result; ``None``: a new tensor."""
    returned: Tensor | None
    """The same for others, if that is another tensor."""
    staged: Tensor | None
    """The model's next input."""
    original: Tensor | None
    """x_0, or what is in its place, if it cannot wait until it is asked for."""


def run_counted(
    scheduler: Any,
    loop: CountedLoop,
    call: int,
    sample: Tensor,
    predictions: Tensor | list[Tensor],
    guidance: Guidance | None,
    dtypes: Dtypes,
    noise: Tensor | None,
    source: Any,
    lead: int = 1,
) -> tuple[StepTable, Tensor, Callable[[], Tensor] | Tensor | None]:
    """Make a step.

    Args:
        scheduler, loop, call, sample, predictions, guidance, dtypes: the step.
        noise, source: its noise, or the generator that draws it.
        lead: how many dimensions of the sample's the guidance has a scale for.

    Returns:
        The table that it was made by, the sample in the dtype that diffusers returns, and x_0, or what predicts it when
        it is asked for.
    """
    given, anchor = loop.inputs(sample, dtypes)
    to = _outputs(scheduler, loop, call, given, anchor, sample, predictions, dtypes, lead)
    second, inputs = loop.made.second, inputs_of(given, predictions)
    tensors = given, predictions, noise, to.original, to.out, to.returned if to.staged is None else to.staged
    shape, original = given.shape, to.original
    if lead > 1:  # frames are samples to the kernel
        tensors = tuple([_flat(each, lead) for each in tensors])
        inputs = inputs_of(tensors[0], tensors[1])
    given, predictions, noise, original, out, staged = tensors
    result = guided_step(
        to.table, call, given, predictions, guidance, noise=noise, generator=source, history=loop.history,
        anchor=anchor, original=original if scheduler._returns_original else None, out=out, staged=staged,
    )  # fmt: skip
    if original is not None and not scheduler._returns_original:  # the inputs are read again, from the cache still
        assert second is not None
        guided_step(second, call, given, predictions, guidance, out=original)
    answer = loop.note(call, result.view(shape) if lead > 1 else result, to.returned, to.staged)
    if to.original is not None or second is None:
        return to.table, answer, to.original
    versions = tuple(tensor._version for tensor in inputs)
    later = functools.partial(
        predict_second, second, call, inputs, versions, predictions, guidance, dtypes.original, shape
    )
    return to.table, answer, later


def _outputs(
    scheduler: Any,
    loop: CountedLoop,
    call: int,
    given: Tensor,
    anchor: Tensor | None,
    sample: Tensor,
    predictions: Tensor | list[Tensor],
    dtypes: Dtypes,
    lead: int,
) -> _Outputs:
    """Return what a step is to write."""
    made, table = loop.made, loop.table
    assert table is not None
    rounds = scheduler.float32_state and dtypes.is_rounded
    keeps = rounds or made.keeps[call]
    out, returned = places(loop, given, anchor, sample, dtypes.result, rounds, keeps)
    staged = original = None
    if made.staging is not None and lead == 1 and not rounds:
        table, staged = made.staging, None if keeps else counted_like(given, dtypes.result)
    inference = any(map(Tensor.is_inference, inputs_of(given, predictions)))
    if made.second is not None and (made.churned[call] or inference):
        original = counted_like(sample, dtypes.original)
    return _Outputs(table, out, returned, staged, original)


def _flat(tensors: Any, lead: int) -> Any:
    """Return tensors whose first dimensions are one."""
    if isinstance(tensors, list):
        return [each.flatten(0, lead - 1) for each in tensors]
    return None if tensors is None else tensors.flatten(0, lead - 1)


def counted_like(given: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new tensor whose writes torch counts, in inference mode as well."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return empty_like(given, dtype)
    return empty_like(given, dtype)


def places(
    loop: CountedLoop,
    given: Tensor,
    anchor: Tensor | None,
    sample: Tensor,
    dtype: torch.dtype,
    rounds: bool,
    keeps: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return where a step writes its result, and what it returns instead, of ``dtype``, if it keeps the result."""
    private = loop.private(given, anchor) if keeps and not rounds and given.dtype == dtype else None
    if private is not None:
        return private, counted_like(sample, dtype)
    return _new_for(given, sample, torch.float32 if rounds else dtype, dtype if keeps else None)


def _new_for(
    given: Tensor, sample: Tensor, dtype: torch.dtype, returned: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return where a step is to write its result, and a second tensor, of the dtype ``returned``, if there is one.

    ``None``: the step makes a new tensor itself. In inference mode, it would be one whose writes torch does not count.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return empty_like(given, dtype), None if returned is None else empty_like(sample, returned)
    if returned is not None:
        return empty_like(given, dtype), empty_like(sample, returned)
    return None if given.dtype == dtype else empty_like(given, dtype), None


def inputs_of(given: Tensor, predictions: Tensor | list[Tensor]) -> list[Tensor]:
    """Return what a step computes from, its sample first."""
    return [given, *predictions] if isinstance(predictions, list) else [given, predictions]


def predict_second(
    second: StepTable,
    call: int,
    inputs: list[Tensor],
    versions: tuple[int, ...],
    predictions: Tensor | list[Tensor],
    guidance: Guidance | None,
    dtype: torch.dtype,
    shape: torch.Size | None = None,
) -> Tensor:
    """Predict the x_0 of a step that was made, or what is in its place; the first of its inputs is the sample."""
    if tuple(tensor._version for tensor in inputs) != versions:
        raise RuntimeError("pred_original_sample: expected the inputs of its step as they were, got one changed")
    made = guided_step(second, call, inputs[0], predictions, guidance, out=empty_like(inputs[0], dtype))
    return made if shape is None else made.view(shape)
