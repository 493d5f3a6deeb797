"""Make a step of a kind that was made before, without the checks that cannot fail again and torch's dispatcher.

A kind of step is a table, a guidance, and the layouts of the tensors. The first step of a kind is checked and made by
the operator, and the second one is also written down: ``record_step`` gives the kernel's arguments as plain data, and
the library's ``describe`` adds what has to be as it was. For each further step, the library's ``repeat`` looks for its
kind, puts the call's pointers into a copy of the record, checks what pointers and positions can have wrong, and runs
the kernel. Where anything watches, such as torch.compile, a mode or the profiler, and wherever something differs, the
step is made as the first one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.moment_weights import MomentWeights
from ..solvers.table import StepTable
from .attached import functions, is_watched
from .backends import native
from .backends.registry import Backend
from .call import Call
from .cursor import Cursor
from .memory import needs_no_advice
from .operator import StepArguments
from .torch_normals import is_torch_s

_MOST_TABLES = 64
_MOST_KINDS = 32
"""Of one table."""
_MOST_TRIES = 8
"""Steps of one key that are described: if there are more, what differs is nothing that a kind could tell."""
_lock = threading.RLock()
"""Of what follows, for those who write."""
_NO_REPEAT = 2
"""The byte of a row that no kind is for."""


Kinds: TypeAlias = tuple[Any, ...]
"""As the library's ``repeat`` takes them: a byte for each row of the table, and then the kinds, latest first. A kind is
a tuple of its bytes, and of what these know by identity or point to, which it keeps alive."""

kinds_of: dict[object, Kinds] = {}
"""The kinds of a table's steps, by the table's token."""
_seen: dict[object, dict[Any, _Seen]] = {}
"""By the table's token, which steps were made once: another one like them is described."""


class _Seen:
    """Steps of one key, of which a table has few: how many were made, and what their key has the identity of."""

    __slots__ = ("kept", "made")

    def __init__(self, *kept: Any) -> None:
        self.kept, self.made = kept, 0


def token_of(guidance: Any) -> Any:
    """Return what stands for a guidance in a ``Call``."""
    return guidance._token if isinstance(guidance, Guidance) else guidance


def forget() -> None:
    """Forget all kinds: the next step of each is checked."""
    kinds_of.clear()
    _seen.clear()


def remember(
    table: StepTable, guidance: Guidance | None, call: Call, chosen: Backend, arguments: StepArguments
) -> None:
    """Note a step that the operator has made; at the second of its kind, describe it.

    Args:
        table, guidance, call: as ``guided_step`` got them.
        chosen: the backend that made the step.
        arguments: of the operator.
    """
    if not chosen.repeats or not _may_be_repeated(table, guidance, call, arguments):
        return
    cursor = call.index if type(call.index) is Cursor else None
    absent = tuple(argument is None for argument in call)
    used = arguments.noise is None, arguments.seeds is None
    key = id(call.guidance), id(cursor), used, absent, call.sample.shape, call.sample.dtype
    with _lock:
        seen = _seen.get(table._token)
        if seen is None:
            while len(_seen) >= _MOST_TABLES:
                oldest = next(iter(_seen))
                del _seen[oldest]
                kinds_of.pop(oldest, None)
            seen = _seen[table._token] = {}
        while key not in seen and len(seen) >= _MOST_KINDS:
            del seen[next(iter(seen))]
        same = seen.setdefault(key, _Seen(call.guidance, cursor))
        same.made += 1
        if 1 < same.made <= _MOST_TRIES:
            kinds = kinds_of.get(table._token) or (_rows(table),)
            made_by = None if guidance is None else guidance.weights_from
            kind = describe(kinds[0], call, arguments, chosen, made_by if isinstance(made_by, MomentWeights) else None)
            if kind is not None:
                kinds_of[table._token] = (kinds[0], kind, *kinds[1:_MOST_KINDS])


def _rows(table: StepTable) -> bytes:
    """Return a byte for each row: the library's kinds are for the rows of one byte."""
    rows = bytearray(table.adds_noise)
    for row in table.undefined_rows:
        rows[row] = _NO_REPEAT
    return bytes(rows)


def _may_be_repeated(table: Any, guidance: Guidance | None, call: Call, arguments: StepArguments) -> bool:
    if type(table) is not StepTable or arguments.sample.numel() == 0 or is_watched():
        return False
    if type(call.index) not in (int, Cursor, Tensor):
        return False
    if type(call.index) is not int and table.undefined_rows:  # whose steps the checks refuse one by one
        return False
    if guidance is not None and not _has_constant_weights(guidance, arguments):
        return False
    if call.generator is None:
        return True
    # The library has torch draw on the CPU, into a contiguous tensor
    return (
        type(call.generator) is torch.Generator
        and call.generator.device.type == arguments.sample.device.type == "cpu"
        and arguments.sample.is_contiguous()
    )


def _has_constant_weights(guidance: Guidance, arguments: StepArguments) -> bool:
    """Tell whether the operator's arguments for the guidance are the same in further steps."""
    made_before = guidance.weights_from is not None and arguments.program is None
    return not made_before and guidance.is_constant_on(arguments.sample.device)


def describe(
    rows: bytes, call: Call, arguments: StepArguments, backend: Backend, weights_from: MomentWeights | None = None
) -> tuple[Any, ...] | None:
    """Return the kind of a step that an operator has made, as ``Kinds`` have it; ``None``: it cannot be repeated.

    Args:
        rows: a byte for each row of the table; a kind of an int index is for the rows of the same byte.
        call: the arguments of ``guided_step``.
        arguments: of the operator.
        backend: whose operator it was.
        weights_from: gets what the step makes as its ``last_weights``.
    """
    if functions is None:
        return None
    draws = call.generator is not None and arguments.noise is not None
    if draws:
        is_torch_s()  # so that the library knows it, as it draws without asking
    record = torch.empty(native.record_words(arguments.weights.shape[-1]), dtype=torch.int64, device="cpu")
    torch.ops.fastguide.record_step(*arguments, record=record)
    launch = None if backend.relaunch is None else backend.relaunch(arguments)
    of_thresholds = arguments.inverse_thresholds
    if of_thresholds is not None and (launch is not None or of_thresholds.device.type != "cpu"):
        return None  # they are found before the launch, or in memory that each step has to have for itself
    made = None if weights_from is None else weights_from.last_weights
    new = _GIVEN if call.out is not None else _SMALL if needs_no_advice(arguments.sample) else _LARGE
    described = functions.describe(
        ctypes.string_at(record.data_ptr(), record.nbytes),
        rows[call.index] if type(call.index) is int else 0,
        type(call.index) is Cursor,
        new,
        draws,
        arguments.noise,
        launch,
        weights_from,
        made,
        *call._replace(out=arguments.out),
    )
    if described is None:
        return None
    cursor = call.index if type(call.index) is Cursor else None
    a = arguments
    tensors = a.rows, a.weights, a.cursor, a.timestep, a.program, a.parameters, a.made, a.scratch, a.inverse_thresholds
    return (described, call.guidance, cursor, call.backend, launch, *tensors, weights_from, made)


_GIVEN, _SMALL, _LARGE = range(3)
"""Whose a step's output is: ``enum class NewOutput`` in csrc/binding/repeat.cpp."""


def _never(*_: Any) -> None:
    """Stand for the library's ``repeat`` where there is none."""


repeat: Callable[..., Tensor | None] = _never if functions is None else functions.repeat
"""Make a step: called with the kinds of its table, and a ``Call``; ``None``: nothing was done."""
follow: Callable[..., Tensor | None] = _never if functions is None else functions.follow
"""Make a step like one that was planned, if its ``Facts`` hold; ``None``: nothing was done.

Called with these; the dictionary of their ``names``; the options, the scale and the model's output of the step; its
index, its sample, how often that was written to when the last step had made it, its predictions, the generator, the
history's entries, ``out`` and ``staged``.
"""
