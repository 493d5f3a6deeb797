"""Make a step of a kind that was made before, without the checks that cannot fail again and torch's dispatcher.

A kind of step is a table, a guidance, and the layouts of the tensors. The first step of a kind is checked and made by
the operator, and the second one is also written down: ``record_step`` gives the kernel's arguments as plain data. Each
further step compares the layouts, puts its pointers into the record, and gives that to the library, which checks what
pointers and positions can have wrong. Where anything watches, such as torch.compile, a mode or the profiler, and
wherever something differs, ``repeated`` returns None, and the step is made as the first one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..guidance import Guidance
from ..solvers.table import StepTable
from .backends import native
from .backends.registry import Backend, backend_for
from .cursor import Cursor
from .inpainting import Inpainting
from .memory import empty_like
from .operator import StepArguments

_OTHERWISE = ("predictions", "rows", "weights", "index", "indices", "philox", "philox_threads", "cursor", "timestep")
_FIELDS = tuple(name for name in StepArguments._fields if name not in _OTHERWISE)
"""The tensors that a call may have: the order of ``values`` in ``repeated``; predictions come after them."""
_MOST_KINDS = 256

Layout = tuple[int, torch.Size, tuple[int, ...], torch.dtype, int]
"""Where a record has a tensor's pointer; and the shape, strides, dtype and device (-1: the CPU) that the tensor had."""


class Kind(NamedTuple):
    """One kind of step: what it depends on, kept alive as it is known by identity, and its record."""

    table: StepTable
    guidance: Guidance | None
    cursor: Cursor | None
    backend: Backend
    constants: tuple[Tensor | None, ...]
    """Rows, weights, and the cursor's memory, to which the record points."""
    layouts: tuple[Layout | None, ...]
    predictions: tuple[Layout | None, ...]
    draws_into_out: bool
    """Whether a generator draws the noise into the new output."""
    record: array[int]
    address: int
    index_place: int
    run: Callable[[int], int]


_kinds: dict[tuple[Any, ...], Kind | None] = {}
"""By what is known by identity, and the thread, whose records nobody else fills; None: seen once."""


def repeated(
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None,
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    generator: Any,
    seeds: Tensor | None,
    inpainting: Inpainting | None,
    original: Tensor | None,
    out: Tensor | None,
    staged: Tensor | None,
    backend: str | None,
) -> Tensor | None:
    """Make a step of a known kind, as ``guided_step`` describes its arguments; ``None``: nothing was done.

    Returns:
        ``out``, or a new tensor.
    """
    if torch.compiler.is_compiling():
        return None
    key = _key(table, index, sample, guidance, generator, out, backend)
    kind = None if key is None else _kinds.get(key)
    if kind is None or _is_watched() or kind.backend is not backend_for(backend, sample.device.type):
        return None
    record = kind.record
    if type(index) is int:
        record[kind.index_place] = index
    if kind.cursor is not None and out is not sample:
        return None
    if out is None:
        out = empty_like(sample)
    if kind.draws_into_out:
        if noise is not None:  # besides a generator
            return None
        noise = out
    mask, known, known_noise = (None, None, None) if inpainting is None else inpainting
    values = (out, original, staged, sample, gradient, variance, noise, seeds, mask, known, known_noise)
    for tensor, layout in zip(values, kind.layouts, strict=True):
        if (tensor is not None or layout is not None) and not _fill(record, tensor, layout):
            return None
    tensors = predictions if type(predictions) in (list, tuple) else (predictions,)
    if len(tensors) != len(kind.predictions):
        return None
    for tensor, layout in zip(tensors, kind.predictions, strict=True):
        if not _fill(record, tensor, layout):
            return None
    if kind.draws_into_out:
        out.normal_(generator=generator)
    if kind.run(kind.address):
        if kind.draws_into_out:
            raise RuntimeError("guided_step: the kernel refused a step of a kind that it has made")
        return None
    return out


def _key(
    table: Any, index: Any, sample: Any, guidance: Any, generator: Any, out: Any, backend: Any
) -> tuple[Any, ...] | None:
    """Return what a kind is found by; ``None``: such a call is never repeated."""
    if type(index) is int:
        if not (type(table) is StepTable and 0 <= index < len(table.adds_noise)):
            return None
        if table.undefined_rows and index in table.undefined_rows:
            return None
        adds_noise, place = table.adds_noise[index], None
    elif type(index) is Cursor and type(table) is StepTable and not table.undefined_rows:
        adds_noise, place = table.adds_noise_anywhere, id(index)
    else:
        return None
    if type(sample) is not Tensor or not (generator is None or type(generator) is torch.Generator):
        return None
    drawn = None
    if generator is not None:
        if generator.device != sample.device:
            return None
        drawn = adds_noise
    return id(table), id(guidance), place, adds_noise, drawn, out is None, backend, sample.shape, get_ident()


def _fill(record: array[int], tensor: Any, layout: Layout | None) -> bool:
    """Put a tensor's pointer into a record; tell whether it has the layout that was checked, and memory."""
    if layout is None or type(tensor) is not Tensor:
        return False
    place, shape, strides, dtype, device = layout
    if tensor.shape != shape or tensor.stride() != strides or tensor.dtype is not dtype or tensor.requires_grad:
        return False
    pointer = tensor.data_ptr()
    record[place] = pointer
    return pointer != 0 and tensor.get_device() == device


def _is_watched() -> bool:
    """Tell whether something but torch.compile is to see the operator itself."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def remember(
    table: StepTable,
    index: int | Tensor | Cursor,
    guidance: Guidance | None,
    generator: Any,
    out: Tensor | None,
    backend: str | None,
    chosen: Backend,
    arguments: StepArguments,
) -> None:
    """Note a step that the operator has made; at the second of its kind, write its record.

    ``arguments``: of the operator; the others as ``guided_step`` got them.
    """
    if chosen.name != "native" or not native.can_repeat() or arguments.sample.numel() == 0 or _is_watched():
        return
    key = _key(table, index, arguments.sample, guidance, generator, out, backend)
    if key is None or arguments.philox is not None or (guidance is not None and guidance.weights_from is not None):
        return
    if key not in _kinds:
        while len(_kinds) >= _MOST_KINDS:
            del _kinds[next(iter(_kinds))]
        _kinds[key] = None
        return
    draws = generator is not None and arguments.noise is not None
    outputs = (out, arguments.original, arguments.staged)
    if draws and (arguments.noise is not arguments.out or any(output is not None for output in outputs)):
        return  # drawn elsewhere; or a bad output would be refused after the draw
    _kinds[key] = _kind(table, index, guidance, chosen, arguments, draws)


def _kind(
    table: StepTable, index: Any, guidance: Guidance | None, chosen: Backend, arguments: StepArguments, draws: bool
) -> Kind:
    places = native.record_places()
    words = places["predictions"] + places["prediction"] * arguments.weights.shape[-1]  # of all predictions, and more
    record = array("q", bytes(8 * words))
    torch.ops.fastguide.record_step(*arguments, record=torch.frombuffer(record, dtype=torch.int64))

    def layout(tensor: Tensor | None, place: int) -> Layout | None:
        if tensor is None:
            return None
        return place, tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()

    layouts = tuple(layout(getattr(arguments, name), places[name]) for name in _FIELDS)
    first, apart = places["predictions"], places["prediction"]
    predictions = tuple(layout(tensor, first + k * apart) for k, tensor in enumerate(arguments.predictions))
    cursor = index if isinstance(index, Cursor) else None
    constants = arguments.rows, arguments.weights, arguments.cursor, arguments.timestep
    return Kind(
        table, guidance, cursor, chosen, constants, layouts, predictions, draws, record, record.buffer_info()[0],
        places["index"], native.run_record(),
    )  # fmt: skip
