"""Run one step of a loop that a scheduler counts: the kernel's call, and what the loop keeps of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from ..solvers import StepTable
from ..step.guided_step import guided_step
from ..step.history import History
from ..step.memory import empty_like
from ..step.repeat import kinds_of, repeat
from .host_tables import HostTables
from .lazy_guidance import Output
from .lazy_outputs import LazyOriginal
from .loop_tables import LoopTable
from .repeat import predictions_again, versions_of
from .scheduler_step import count_fused
from .timesteps import version_of


class Like(NamedTuple):
    """What a loop's last step and those like it have in common, but their tensors: see ``_again``."""

    scale: Any
    """A number, the weights of several predictions, or ``None``."""
    guidance: Guidance | None
    guidance_token: Any
    table: StepTable
    token: object
    model_dtype: torch.dtype


@dataclass
class CountedLoop:
    """A loop over a scheduler's steps, from its first on."""

    tables: HostTables
    begin: int
    arguments: tuple[Any, ...]
    """Of ``step``, those that rows depend on."""
    shape: torch.Size
    made: LoopTable
    table: StepTable | None
    """``None``: the loop is left to diffusers."""
    history: History | None = None
    following: int = 0
    """The step that comes next."""
    returned: Tensor | None = None
    """What the last step returned, and how often it had been written to."""
    version: int = 0
    state: Tensor | None = None
    """The same in float32, where ``returned`` is rounded."""
    staged: Tensor | None = None
    """The model's input of ``returned``, where the step has written it."""
    used: StepTable | None = None
    """The table of the last step: ``table``, or the one that scales inputs as well."""
    like: Like | None = None
    why_not: str | None = None
    """Why steps are left to diffusers."""

    def may_begin_like_an_earlier_one(self, sample: Tensor) -> bool:
        """Tell whether its first step may be like a step of an earlier loop over the same table; prepare for that."""
        if self.returned is not None or not self.made.likes or sample.is_inference():
            return False
        like = self.made.likes[0]
        if sample.dtype != like.model_dtype or sample.dtype not in (torch.float32, torch.float64):
            return False  # a state that is kept besides the sample begins with a plan
        self.like, self.returned, self.version = like, sample, sample._version
        return True

    def is_current(self, scheduler: Any) -> bool:
        """Tell whether the scheduler's tables and configuration are those that the loop began with."""
        own, tables = scheduler.__dict__, self.tables
        if own[scheduler._levels_in] is not tables.sigmas or own["timesteps"] is not tables.timesteps:
            return False
        try:
            versions: Any = tables.sigmas._version, tables.timesteps._version
        except RuntimeError:  # inference tensors, which count nothing
            versions = version_of(tables.sigmas), version_of(tables.timesteps)
        return versions == tables.versions and own["_internal_dict"] is tables.config


def run_counted(
    scheduler: Any,
    loop: CountedLoop,
    call: int,
    sample: Tensor,
    predictions: Tensor | list[Tensor],
    guidance: Guidance | None,
    model_dtype: torch.dtype,
    noise: Tensor | None,
    source: Any,
    lead: int = 1,
) -> tuple[Tensor, Callable[[], Tensor] | Tensor | None]:
    """Make a step; return the sample in the dtype that diffusers returns, and x_0, or what predicts it when asked.

    ``lead``: how many dimensions the guidance has a scale for, of the sample's.
    """
    promoted = sample.dtype if sample.dtype == model_dtype else torch.promote_types(sample.dtype, model_dtype)
    dtype = model_dtype if scheduler._casts_back else promoted
    if scheduler._casts_back:  # after it has made the sample float32
        promoted = torch.promote_types(promoted, torch.float32)
    given, anchor = sample, None
    if loop.returned is not None:
        untouched = loop.version == version_of(loop.returned)
        if sample is loop.returned and untouched:
            given = sample if loop.state is None else loop.state
        elif loop.history is not None and (untouched or loop.state is not None):
            anchor = loop.returned if loop.state is None else loop.state  # solvers that go back find what they wrote
    rounds = scheduler.float32_state and dtype in (torch.bfloat16, torch.float16)
    if dtype == torch.float64 or (rounds and given.dtype == torch.float64):
        given = given.double()
    if anchor is not None and anchor.dtype != given.dtype:
        given = given.to(torch.promote_types(anchor.dtype, given.dtype))
        anchor = anchor.to(given.dtype)
    inputs = inputs_of(given, predictions)
    second = loop.made.second
    now = second is not None and (loop.made.churned[call] or any(map(Tensor.is_inference, inputs)))
    original = empty_like(sample, promoted) if now else None
    out, returned = _new_for(given, sample, torch.float32 if rounds else dtype, dtype if rounds else None)
    shape, table = given.shape, loop.table
    loop.staged = None
    if loop.made.staging and lead == 1 and not rounds:
        table, loop.staged = loop.made.staging[0], _counted_like(given, dtype)
    assert table is not None
    loop.used, staged = table, returned if loop.staged is None else loop.staged
    if lead > 1:  # frames are samples to the kernel
        given, predictions, noise, original, out, staged = (
            _flat(each, lead) for each in (given, predictions, noise, original, out, returned)
        )
        inputs = inputs_of(given, predictions)
    result = guided_step(
        table, call, given, predictions, guidance, noise=noise, generator=source, history=loop.history, anchor=anchor,
        original=original, out=out, staged=staged,
    )  # fmt: skip
    if lead > 1:
        result, original = result.view(shape), None if original is None else original.view(shape)
    loop.state = result if rounds else None
    loop.returned = result if returned is None else returned
    loop.version = version_of(loop.returned) or 0
    if second is None:
        return loop.returned, None
    if original is not None:  # x_0; for what is in its place, the inputs, which are in the cache still, are read again
        if scheduler._returns_original:
            return loop.returned, original
        guided_step(second, call, given, predictions, guidance, out=_flat(original, lead) if lead > 1 else original)
        return loop.returned, original
    versions = tuple(tensor._version for tensor in inputs)
    return loop.returned, functools.partial(
        _predict_second, second, call, inputs, versions, predictions, guidance, promoted, shape
    )


def _flat(tensors: Any, lead: int) -> Any:
    """Return tensors whose first dimensions are one."""
    if isinstance(tensors, list):
        return [each.flatten(0, lead - 1) for each in tensors]
    return None if tensors is None else tensors.flatten(0, lead - 1)


def _counted_like(given: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new tensor whose writes torch counts, in inference mode as well."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return empty_like(given, dtype)
    return empty_like(given, dtype)


def _new_for(
    given: Tensor, sample: Tensor, dtype: torch.dtype, rounded: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return where a step is to write its result, and what it returns instead, ``rounded``.

    ``None``: the step makes a new tensor itself. In inference mode, it would be one whose writes torch does not count.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return empty_like(given, dtype), None if rounded is None else empty_like(sample, rounded)
    if rounded is not None:
        return empty_like(given, dtype), empty_like(sample, rounded)
    return None if given.dtype == dtype else empty_like(given, dtype), None


def inputs_of(given: Tensor, predictions: Tensor | list[Tensor]) -> list[Tensor]:
    """Return what a step computes from, its sample first."""
    return [given, *predictions] if isinstance(predictions, list) else [given, predictions]


def run_again(
    scheduler: Any,
    loop: CountedLoop,
    like: Like,
    arguments: tuple[Any, ...],
    output: Output,
    sample: Tensor,
    source: Any,
    return_dict: bool,
    guidance_scale: Any,
) -> Any:
    """Make a step like the last one, without planning it; ``None``: nothing was done.

    ``source``: the generator that draws its noise.
    """
    index, kinds = scheduler._step_index, kinds_of.get(like.token)
    if kinds is None or index != loop.following or arguments != loop.arguments or sample is not loop.returned:
        return None
    if type(guidance_scale) is not type(like.scale) or guidance_scale != like.scale:
        return None
    predictions = output if type(output) is Tensor else predictions_again(output)
    if predictions is None:
        return None
    if not loop.is_current(scheduler):
        return None
    try:
        if sample._version != loop.version or output.dtype != like.model_dtype:
            return None
        seen = () if loop.made.second is None else versions_of(predictions)
    except RuntimeError:  # an inference tensor, which counts nothing
        return None
    assert index is not None
    call, state, history, out, staged = index - loop.begin, loop.state, loop.history, None, None
    if loop.made.churned and loop.made.churned[call]:
        return None
    given = sample
    if state is not None:
        given = state
    if state is not None or torch.is_inference_mode_enabled():
        out, staged = _new_for(given, sample, given.dtype, None if state is None else sample.dtype)
    scaled = None
    if loop.made.staging and state is None:
        if like.table is not loop.made.staging[0]:
            return None
        scaled = staged = _counted_like(given, given.dtype)
    entries = None if history is None else history.entries
    result = repeat(
        kinds, call, given, predictions, like.guidance_token, None, None, None, source, None, None, entries, None,
        None, out, staged, None,
    )  # fmt: skip
    if result is None:
        return None
    if history is not None:
        history.note(call)
    loop.state = None if state is None else result
    loop.returned = answer = result if state is None or staged is None else staged
    loop.staged = scaled
    loop.version = answer._version
    loop.following = scheduler._step_index = index + 1
    if scheduler._fusion is not None:
        count_fused(scheduler, like.guidance)
    second = loop.made.second
    if second is None:
        return scheduler._plain_output(prev_sample=answer) if return_dict else (answer,)
    dtype = torch.float32 if scheduler._casts_back and given.dtype != torch.float64 else answer.dtype
    original = functools.partial(
        _predict_second, second, call, inputs_of(given, predictions), (given._version, *seen), predictions,
        like.guidance, dtype,
    )  # fmt: skip
    return scheduler._output(answer, original) if return_dict else (answer, LazyOriginal.of(answer, original))


def _predict_second(
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
