"""Begin the loop anew that has come to its end, where the next one is like it, without planning its first step.

A pipeline runs the same loop for each image. Each function that a first step calls is cold then, as models and other
code have run since the last one: so this asks little, and leaves all to the step that the step compares anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from .counted_loop import CountedLoop, form_of
from .host_tables import HostTables


def begun_anew(scheduler: Any, own: dict[str, Any], timestep: Any, sample: Any) -> CountedLoop | None:
    """Begin the last loop anew if a step may be its first one; ``None``: nothing but the step's index was found.

    This compares what ``step_again`` does not: where the loop begins, the values of the tables and of the attributes,
    and the form and the dtype of the sample. That compares the rest, history included; ``end_beginning`` is told what
    came of it. If it raises, the loop is begun, and keeps the sample until the next step or ``set_timesteps``.

    Args:
        scheduler: whose step it is; no loop of it is under way.
        own: its ``__dict__``.
        timestep, sample: of ``step``.
    """
    ended: CountedLoop | None = own.get("_ended")
    if ended is None:
        return None
    made = ended.made
    like = made.like
    if like is None or not like.begins:
        return None
    if type(sample) is not Tensor or ended.sample_form != form_of(sample) or sample.dtype is not like.dtype:
        return None
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    if scheduler._step_index != ended.begin:
        return None
    try:
        version = sample._version
    except RuntimeError:  # an inference tensor, which counts nothing
        return None
    tables, attributes = own["_host"], ended.attributes
    if not ended.tables.says_the_same_as(tables):
        return None
    if attributes or made.changeable:
        attributes = scheduler._attributes()
        if not made.is_of(own["_internal_dict"], tuple(attributes)):
            return None
    ended.begin_again(tables, attributes)
    ended.go_on_like(like)
    ended.returned, ended.version = sample, version
    own["_counted"], own["_ended"] = ended, None
    return ended


def end_beginning(scheduler: Any, own: dict[str, Any], loop: CountedLoop, *, begun: bool) -> None:
    """Warn as where any loop begins; or undo ``begun_anew``, as the first step is like none that was made."""
    if begun:
        return warn_of_unscaled_inputs(scheduler)
    loop.following = loop.begin + loop.calls
    loop.end()
    own["_counted"], own["_ended"] = None, loop
    return None


def ended_loop_again(
    scheduler: Any,
    tables: HostTables,
    index: int,
    arguments: tuple[Any, ...],
    sample: Tensor,
    dtype: torch.dtype,
) -> CountedLoop | None:
    """Begin the loop anew that has come to its end, if one that begins at a step is like it; otherwise ``None``."""
    ended: CountedLoop | None = scheduler._ended
    if ended is None or not ended.is_like(tables, index, arguments, scheduler._attributes(), sample, dtype):
        return None
    ended.begin_again(tables, scheduler._attributes())
    scheduler._counted, scheduler._ended = ended, None
    warn_of_unscaled_inputs(scheduler)
    return ended


def warn_of_unscaled_inputs(scheduler: Any) -> None:
    """Warn where a loop begins and ``scale_model_input`` has never been called, as diffusers does at each step."""
    if scheduler.__dict__.get("is_scale_input_called") is False:
        logging.get_logger(type(scheduler).__module__).warning(
            "scale_model_input: expected to be called before each step, as the model is made for what it returns, "
            "got no call; the images may be wrong"
        )
