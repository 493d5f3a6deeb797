"""Make a step's weights from moments by two Triton kernels, launched before the step's own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...guidance.encoded import MOST_TERMS, MOST_VALUES, OTHER_INPUTS, PART, moment_names, scratch_numbers
from ..operator import StepArguments
from .triton import OPTIONS

PART_WARPS = 8  # 16 elements of a thread, of each term
SAMPLE_WARPS = 1
_FEWEST_VALUES = 32

_compiled: set[tuple[Any, ...]] = set()
"""What the kernels were compiled for, on each GPU."""


def with_made_weights(a: StepArguments) -> StepArguments:
    """Launch what makes the weights; return the arguments of the step that reads them, and has no program.

    ``a``: a step with a program, whose predictions are apart.
    """
    if a.scratch is None:  # interpreted
        terms, elements = _made(a).shape[1] - 1, a.sample[0].numel()
        numbers = scratch_numbers(terms, len(a.sample), elements)
        a = a._replace(scratch=torch.zeros(numbers, dtype=torch.float64, device=a.sample.device))
    _launch(a)
    return reading_step(a)


def reading_step(a: StepArguments) -> StepArguments:
    """Return the arguments of the step behind the launches: where the sample has a weight, it is one more prediction.

    Such weights are where csrc/kernels/gpu/moments.h has them: behind the sums and counters in the kernels' memory.
    """
    weights, predictions = _made(a), tuple(a.predictions)
    if _weighs_sample(a):
        weights, predictions = _read(a), (*predictions, a.sample)
    return a._replace(
        weights=weights[None], predictions=predictions, program=None, parameters=None, made=None, scratch=None  # type: ignore[arg-type]
    )  # fmt: skip


def _made(a: StepArguments) -> Tensor:
    assert a.made is not None
    return a.made


def _weighs_sample(a: StepArguments) -> bool:
    return _made(a).shape[1] - 1 > len(a.predictions)


def _read(a: StepArguments) -> Tensor:
    """Return the place of weights in the order in which the step reads them."""
    assert a.scratch is not None
    made, batch = _made(a), len(a.sample)
    sums = batch * parts_of(a) * len(moment_names(made.shape[1] - 1))
    return a.scratch[sums + batch :].view(torch.float32)[: made.numel()].view(made.shape)


def parts_of(a: StepArguments) -> int:
    """Return how many parts a sample has."""
    return -(-a.sample[0].numel() // PART)


def _launch(a: StepArguments) -> None:
    from . import triton_moments_kernel as kernels

    assert a.program is not None
    assert a.parameters is not None
    batch, size, parts, made = len(a.sample), a.sample[0].numel(), parts_of(a), _made(a)
    terms, read = made.shape[1] - 1, _read(a) if _weighs_sample(a) else None
    tensors = tuple(a.predictions) if read is None else (*a.predictions, a.sample)
    strides = tuple(tensor.stride(0) if batch > 1 else size for tensor in tensors)
    position = (
        a.indices, a.cursor, a.index, a.indices.stride(0) if a.indices is not None and a.indices.dim() else 0,
        0 if a.cursor is None else _stride_unless_one(a.cursor, 0),
    )  # fmt: skip
    instructions, numbers = (a.program.shape[1] - 1 - terms) // 4, a.parameters.shape[-1]
    values = values_tile(len(moment_names(terms)) + len(OTHER_INPUTS) + numbers + instructions)
    kind = _kind_of(a, (*tensors, read), size, *strides, terms, int(read is not None), values)
    if kind not in _compiled and a.sample.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend: the Triton kernels that make weights are not compiled for these arguments yet, and cannot be "
            "during a capture; run the step once before"
        )
    on_gpu = a.sample.device.type == "cuda"
    with torch.cuda.device(a.sample.device) if on_gpu else contextlib.nullcontext():
        kernels.moments_kernel[(batch * parts, 1, 1)](
            tensors, strides, size, a.scratch, *position, parts,
            terms, read is not None, size % PART == 0, PART, num_warps=PART_WARPS, **OPTIONS,
        )  # fmt: skip
        kernels.weights_kernel[(batch, 1, 1)](
            a.scratch, a.rows, a.weights, a.program, a.parameters, made, read, *position, a.rows.shape[0], size, parts,
            _stride_unless_one(a.weights, 0), _stride_unless_one(a.weights, 1), _stride_unless_one(a.program, 0),
            instructions, _stride_unless_one(a.parameters, 0), _stride_unless_one(a.parameters, 1), numbers,
            terms, read is not None, values, num_warps=SAMPLE_WARPS, **OPTIONS,
        )  # fmt: skip
    _compiled.add(kind)


def check_program(a: StepArguments) -> None:
    """Refuse what the kernels would read beyond its end, or as something else."""
    batch, count = len(a.sample), a.weights.shape[-1] - 1
    program, parameters, made = a.program, a.parameters, a.made
    if program is None or parameters is None or made is None:
        raise RuntimeError("program: expected program, parameters and made together")
    if program.dtype != torch.int32 or not program.is_contiguous() or program.shape[0] not in (1, batch):
        raise RuntimeError(f"program: expected int32 of shape (1 or {batch}, words), got {_told(program)}")
    if (
        made.dtype != torch.float32
        or not made.is_contiguous()
        or made.shape not in ((batch, count + 1), (batch, count + 2))
    ):
        raise RuntimeError(f"made: expected float32 of shape ({batch}, {count + 1} or one more), got {_told(made)}")
    if parameters.dtype != torch.float64 or parameters.dim() != 3 or not parameters.is_contiguous():
        raise RuntimeError(f"parameters: expected float64 of three dimensions, contiguous, got {_told(parameters)}")
    if not 2 <= made.shape[1] - 1 <= MOST_TERMS:
        raise RuntimeError(f"program: expected 2 to {MOST_TERMS} terms to make weights of, got {made.shape[1] - 1}")
    numbers = scratch_numbers(made.shape[1] - 1, batch, a.sample[0].numel())
    scratch = a.scratch
    if scratch is None and a.sample.device.type != "cpu":
        raise RuntimeError("scratch: expected a tensor with a program on a GPU, got None")
    if scratch is not None and (
        scratch.dtype != torch.float64 or not scratch.is_contiguous() or scratch.numel() < numbers
    ):
        raise RuntimeError(f"scratch: expected float64, contiguous, of at least {numbers}, got {_told(scratch)}")


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"


def values_tile(values: int) -> int:
    """Return the size of the tile that holds a program's values: a power of two."""
    tile = _FEWEST_VALUES
    while tile < min(values, MOST_VALUES):
        tile *= 2
    return tile


def _kind_of(a: StepArguments, tensors: tuple[Tensor | None, ...], *numbers: int) -> tuple[Any, ...]:
    """Return what Triton compiles the kernels anew for.

    ``tensors``: the terms, and the weights as the step reads them; ``numbers``: of the launches, and constants.
    """
    others = (a.scratch, a.indices, a.cursor, a.rows, a.weights, a.program, a.parameters, a.made)
    return (
        a.sample.device, numbers[0] % PART == 0, tuple(number for number in numbers if number <= MOST_VALUES),
        *(None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in (*tensors, *others)),
        *((number == 1, number % 16 == 0, number >= 2**31) for number in numbers),
    )  # fmt: skip


def _stride_unless_one(tensor: Tensor, dimension: int) -> int:
    return tensor.stride(dimension) if tensor.shape[dimension] > 1 else 0
