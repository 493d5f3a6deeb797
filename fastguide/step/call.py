"""What the library's repeated steps get of Python: a call of ``guided_step``, and the objects that they need."""

from __future__ import annotations

from types import CodeType
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """The arguments of ``guided_step`` but the table, in its order: ``FASTGUIDE_CALL`` in csrc/binding/call.h."""

    index: Any
    sample: Any
    predictions: Any
    guidance: Any
    """What stands for it, and is compared by identity."""
    gradient: Any
    variance: Any
    noise: Any
    generator: Any
    seeds: Any
    inpainting: Any
    history: Any
    """Its entries."""
    anchor: Any
    original: Any
    out: Any
    staged: Any
    backend: Any


class Facts(NamedTuple):
    """What a step that was planned depends on, but its tensors: ``FASTGUIDE_FACTS`` in csrc/binding/call.h.

    A further step is like it if these hold: see ``follow`` in ``fastguide.step.repeat``.
    """

    kinds_of: dict[object, Any]
    """The kinds of tables, by their tokens."""
    token: object
    """The table's."""
    guidance: Any
    """What stands for it in a ``Call``."""
    scale: Any
    """That of guidance, which is compared by type and value."""
    options: tuple[Any, ...]
    """Compared by value."""
    dtype: torch.dtype | None
    """The model output's; ``None``: any of which there is a kind, as nothing but the step's output depends on it."""
    names: tuple[str, ...]
    """Of a dictionary's entries, which are to be the very objects of ``values``."""
    values: tuple[Any, ...]
    tensors: tuple[Any, ...]
    """Which are to have been written to as often as ``versions`` say."""
    versions: tuple[int | None, ...]


class Objects(NamedTuple):
    """Objects that the library keeps: ``FASTGUIDE_OBJECTS`` in csrc/binding/objects.h."""

    none: None
    true_object: bool
    integer_type: type
    tensor_type: type
    generator_type: type
    sequence_types: tuple[type, ...]
    """Of predictions."""
    inpainting_type: type
    cpu: Any
    """Its torch.device."""
    requires_grad: str
    """A name, as are ``dtype``, ``version``, ``last_weights``, ``device``, ``current_level`` and ``generator``."""
    dtype: str
    version: str
    last_weights: str
    storage_offset: Any
    """A function of a tensor."""
    device: str
    is_grad_enabled: Any
    watchers: tuple[Any, ...]
    """Functions, each true while something is to see the operator."""
    forward_ad: dict[str, Any]
    """A module's globals, whose ``current_level`` is -1 outside of forward-mode differentiation."""
    current_level: str
    empty_like: Any
    """Makes a small, contiguous tensor like another."""
    new_like: Any
    """Makes any tensor like another."""
    normal_: Any
    """Fills a tensor with normal values of a ``generator``."""
    generator: str
    get_state: Any
    """Returns a generator's state, as do the bytes that ``set_state`` takes."""
    set_state: Any
    count_threads: Any
    """Returns how many threads of Python there are beside the main one."""
    own_thread: Any
    """Returns this one's identifier."""
    frames: Any
    """Returns what each of them executes, by their identifiers; ``locals`` are an attribute of that."""
    locals: str
    waits: list[tuple[CodeType, str | None]]
    """Functions in which a thread does nothing but wait, and which of their variables has to be ``None``."""
    exchange: Any
    """DLPack's capsule."""
