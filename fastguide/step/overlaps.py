"""What ``guided_step`` refuses of memory that tensors share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._subclasses import FakeTensor

from .memory import element_for_element, overlaps
from .operator import MAY_BE_OUTPUT, StepArguments


def check_memory(arguments: StepArguments) -> None:
    """Refuse outputs whose memory another tensor shares, where the step could read what it has already written."""
    if isinstance(arguments.out, FakeTensor):  # which has no memory, and warns who asks for it
        return
    inputs = arguments.named_inputs()
    _check_output("out", arguments.out, inputs)
    others = [("out", arguments.out), *inputs, ("index", arguments.indices), ("seeds", arguments.seeds)]
    if arguments.original is not None:
        _check_output("original", arguments.original, inputs)
        if arguments.original.data_ptr() == arguments.out.data_ptr() != 0 or not _apart_or_interleaved(
            arguments.original, arguments.out
        ):
            raise ValueError("original: expected memory apart from out, got an overlap")
        others.append(("original", arguments.original))
    if arguments.history is not None:  # it is read as well
        _check_apart("history", arguments.history, others)
        others.append(("history", arguments.history))
    if arguments.staged is not None:  # its samples are written while others' inputs are still to be read
        _check_apart("staged", arguments.staged, others)


def _check_output(name: str, output: Tensor, inputs: list[tuple[str, Tensor]]) -> None:
    for other, tensor in inputs:
        if not overlaps(output, tensor):
            continue
        if other.partition("[")[0] not in MAY_BE_OUTPUT:
            raise ValueError(f"{name}: expected memory apart from {other}, got an overlap")
        if not element_for_element(output, tensor):
            raise ValueError(
                f"{name}: expected memory apart from {other}, or the same element for element; got a part of it"
            )


def _apart_or_interleaved(first: Tensor, second: Tensor) -> bool:
    return not overlaps(first, second) or element_for_element(first, second)


def _check_apart(name: str, output: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    for other, tensor in others:
        if tensor is not None and overlaps(output, tensor):
            raise ValueError(f"{name}: expected memory apart from {other}, got an overlap")
