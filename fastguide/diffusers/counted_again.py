"""Make a step of a loop like an earlier one, without planning it.

What a plan depends on is compared here, and in the library: ``fastguide.step.repeat`` knows the kind of the step by the
layouts, dtypes and devices of its tensors. A step on a small sample takes a few microseconds, as long as ten calls of
Python's functions or attributes of tensors. So the usual one is made in one function, and asks no tensor twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import is_
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, is_inference_mode_enabled

from ..step.memory import empty_like
from ..step.repeat import follow, kinds_of, repeat
from .counted_loop import CountedLoop, Like
from .counted_run import counted_like, inputs_of, predict_second
from .counted_run import places as places_of
from .drawing import APART, REPLANNED, Drawing
from .halves import OfHalves
from .lazy_guidance import resolved
from .lazy_outputs import LazyOriginal
from .repeat import predictions_again, versions_of
from .taken import Taken

_OURS = 2
"""References to an object that a loop alone has, while it is asked how many there are."""


def plain_step_again(
    scheduler: Any, own: dict[str, Any], loop: CountedLoop, arguments: tuple[Any, ...], output: Any, sample: Tensor,
    return_dict: bool, scale: Any, drawing: Drawing | None = None,
) -> Any:  # fmt: skip
    """Make a step of a loop that ``is_plain``, without noise; otherwise as ``step_again`` does."""
    index, result = loop.following, None
    follows = sample is loop.returned and loop.state is None and own["_step_index"] == index
    if follows and drawing is None and not is_inference_mode_enabled():
        given, of_guidance, predictions = output, scale, output
        if type(output) is not Tensor:
            given, of_guidance, predictions = _taken_again(output, sample, scale)
        result = follow(
            loop.facts, own, arguments, of_guidance, given, index - loop.begin, sample, loop.version, predictions, None,
            None, None, None,
        )  # fmt: skip
    if result is None:
        return step_again(scheduler, own, loop, arguments, output, sample, return_dict, scale, drawing)
    own["_step_index"] = loop.following = index + 1
    loop.returned, loop.version = result, 0  # of a new tensor, which only the kernel has written
    if index + 1 - loop.begin == loop.calls:
        loop.end()
        own["_ended"] = loop
    if "_fusion" in own:
        _count_again(own, loop)
    return scheduler._plain_output(prev_sample=result) if return_dict else (result,)


def _count_again(own: dict[str, Any], loop: CountedLoop) -> None:
    """Count a step like the last one, for ``Acceleration.counts``."""
    fusion = own["_fusion"]
    if fusion is not None:
        assert loop.like is not None
        fusion.count_step(loop.like.counted_as, is_last=loop.is_over)


def step_again(
    scheduler: Any, own: dict[str, Any], loop: CountedLoop, arguments: tuple[Any, ...], output: Any, sample: Tensor,
    return_dict: bool, scale: Any, drawing: Drawing | None = None,
) -> Any:  # fmt: skip
    """Make a step like the last one; ``None``: nothing was done.

    Args:
        scheduler: whose step it is.
        own: its ``__dict__``, whose entries take less time than its attributes.
        loop: its own, which has something that steps are ``like``.
        arguments: of ``step``, those that rows depend on.
        output, scale: the model's output and ``guidance_scale``, as ``step`` gets them or taken apart.
        sample, return_dict: of ``step``.
        drawing: where its noise comes from, as in ``counted_step``.
    """
    like, index, made = loop.like, loop.following, loop.made
    assert like is not None
    if sample is not loop.returned or scheduler._step_index != index:
        return None
    if loop.attributes and not all(map(is_, loop.attributes, scheduler._attributes())):
        return None
    predictions: Tensor | list[Tensor] | None = output
    if type(output) is not Tensor:
        output, scale, predictions = _taken_again(output, sample, scale)
    if predictions is None:
        return None
    second = made.second
    seen: tuple[int, ...] = ()
    if second is not None:
        try:
            seen = versions_of(predictions)
        except RuntimeError:  # an inference tensor, which counts nothing: x_0 cannot wait
            return None
    source = None if drawing is None else drawing.source_again(loop, like, sample)
    if source is REPLANNED:
        return None
    generator = None if source is APART else source
    version, result, given, now = loop.version, None, sample, None
    if loop.facts is not None and not is_inference_mode_enabled():
        result = _usual_step_again(own, loop, generator, arguments, output, sample, predictions, scale)
    if result is None:
        done = _general_step_again(scheduler, loop, generator, arguments, output, sample, predictions, scale)
        if done is None:
            return None
        result, given, version, now = done
    if source is APART:
        assert drawing is not None
        drawing.draw_apart(like.dtypes, sample)
    scheduler._step_index = loop.following
    if loop.is_over:
        own["_ended"] = loop
    if "_fusion" in own:
        _count_again(own, loop)
    if second is None:
        return scheduler._plain_output(prev_sample=result) if return_dict else (result,)
    if now is not None:
        return scheduler._result(result, now, like.dtype_of_original, return_dict)
    original = functools.partial(
        predict_second, second, index - loop.begin, inputs_of(given, predictions), (version, *seen), predictions,
        like.guidance, like.dtype_of_original,
    )  # fmt: skip
    return scheduler._output(result, original) if return_dict else _with_original(loop, like, result, original)


def _taken_again(output: Any, sample: Tensor, scale: Any) -> tuple[Any, Any, Tensor | list[Tensor] | None]:
    """Return a model's output, the scale of guidance and the predictions that were left to the step."""
    if type(output) is OfHalves and scale is None and output.is_whole():
        # of another shape than twice the sample's, it is of no kind of step with this guidance
        whole = output.uncond.source.tensor
        return whole, output.scale, whole
    if type(output) is not Taken:
        output, scale = resolved(output, sample, scale, per_frame=True)
    return output, scale, predictions_again(output)


def _with_original(loop: CountedLoop, like: Like, result: Tensor, original: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """Return a step's result, and a lazy x_0: the object of the last step, if nobody has that or has read it."""
    if loop.is_over or not loop.is_little:
        return result, LazyOriginal.of(result, original, like.dtype_of_original)
    if loop.like_of_original is not like or loop.original._value is not None or getrefcount(loop.original) > _OURS:
        loop.original, loop.like_of_original = LazyOriginal.of(result, original, like.dtype_of_original), like
    else:
        loop.original._predict = original
    return result, loop.original


def _usual_step_again(
    own: dict[str, Any],
    loop: CountedLoop,
    generator: torch.Generator | None,
    arguments: tuple[Any, ...],
    output: Any,
    sample: Tensor,
    predictions: Tensor | list[Tensor],
    scale: Any,
) -> Tensor | None:
    """Make a step of a loop whose facts are known, and that does not round; note it in the loop.

    Args:
        own: the scheduler's ``__dict__``.
        generator: what draws the noise that the step adds, if it adds any.

    The others are as in ``_general_step_again``.

    Returns:
        What the scheduler returns; ``None``: nothing was done.
    """
    made, call, state = loop.made, loop.following - loop.begin, loop.state
    new = torch.empty_like if loop.is_small else empty_like
    out = staged = None
    if state is not None and state.dtype != sample.dtype:
        return None
    if made.keeps[call]:
        out, staged = loop.private(sample), new(sample)
        if out is None:
            out = new(sample)
    elif made.staging is not None:
        staged = new(sample)
    history = loop.history
    entries = None if history is None else history.entries
    result = follow(
        loop.facts, own, arguments, scale, output, call, sample, loop.version, predictions, generator, entries, out,
        staged,
    )  # fmt: skip
    if result is None:
        return None
    if history is not None:
        history.note(call)
    loop.following += 1
    if call + 1 == loop.calls:
        loop.end()
        return result
    if state is not None:
        loop.spare = state
    if out is None:
        loop.state, loop.returned, loop.staged = None, result, staged
        loop.version = 0 if generator is None else result._version  # of a new tensor, which the noise was drawn into
        return result
    loop.version = 0  # of a new tensor, which only the kernel has written
    loop.state, loop.returned, loop.staged = result, staged, None
    return staged


def _general_step_again(
    scheduler: Any,
    loop: CountedLoop,
    generator: torch.Generator | None,
    arguments: tuple[Any, ...],
    output: Any,
    sample: Tensor,
    predictions: Tensor | list[Tensor],
    scale: Any,
) -> tuple[Tensor, Tensor, int, Tensor | None] | None:
    """Make a step whose sample is rounded, or begins with noise, or in inference mode; note it in the loop.

    Returns:
        What the scheduler returns, what the step computed from, how often that had been written to, and x_0, if that
        cannot wait; ``None``: nothing was done.
    """
    like, made, call = loop.like, loop.made, loop.following - loop.begin
    assert like is not None
    if type(scale) is not type(like.scale) or scale != like.scale or output.dtype is not like.dtype:
        return None
    kinds = kinds_of.get(like.token)
    now = bool(made.churned) and made.churned[call] and made.second is not None  # its noise is not drawn again
    if arguments != loop.arguments or kinds is None or (now and not scheduler._returns_original):
        return None
    if not (loop.is_untouched() and loop.has_tables_of(scheduler.__dict__)):
        return None
    places = _places_again(scheduler, loop, call, sample)
    if places is None:
        return None
    given, out, returned, staged = places
    original = counted_like(sample, like.dtype_of_original) if now else None
    history = loop.history
    entries = None if history is None else history.entries
    result = repeat(
        kinds, call, given, predictions, like.guidance_token, None, None, None, generator, None, None, entries, None,
        original, out, returned if staged is None else staged, None,
    )  # fmt: skip
    if result is None:
        return None
    if history is not None:
        history.note(call)
    return loop.note(call, result, returned, staged), given, given._version, original


def _places_again(
    scheduler: Any, loop: CountedLoop, call: int, sample: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """Return what a step computes from, and where it writes its result, what it returns, and the model's next input.

    ``None``: it needs a plan.
    """
    like, made, state = loop.like, loop.made, loop.state
    assert like is not None
    rounds, keeps = scheduler.float32_state and like.is_rounded, made.keeps[call]
    if rounds != (state is not None and state.dtype != sample.dtype):
        return None
    given = state if state is not None and rounds else sample
    out = returned = staged = None
    if rounds or keeps or torch.is_inference_mode_enabled():
        out, returned = places_of(loop, given, None, sample, sample.dtype, rounds, rounds or keeps)
    if made.staging is not None and not rounds:
        if like.table is not made.staging:
            return None
        staged = None if keeps else counted_like(given, given.dtype)
    return given, out, returned, staged
