"""Make a step's weights from moments by a Triton kernel that is launched before the step's own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...guidance.encoded import MOST_TERMS, MOST_VALUES, OTHER_INPUTS, PART, number_of_moments, scratch_numbers
from ..operator import StepArguments
from .triton import OPTIONS, kind_of

WARPS = 8  # 16 elements of a thread, of each term
LANES = 32

_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by what each was compiled for, as those of the step."""


def with_made_weights(a: StepArguments) -> StepArguments:
    """Launch the kernel that makes the weights; return the arguments of the step that reads them, and has no program.

    ``a``: a step with a program, whose predictions are apart.
    """
    if a.scratch is None:  # interpreted
        numbers = scratch_numbers(_made(a).shape[1] - 1, a.sample.shape[0], _size(a))
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
    made, batch = _made(a), a.sample.shape[0]
    sums = batch * parts_of(a) * number_of_moments(made.shape[1] - 1)
    return a.scratch[sums + batch :].view(torch.float32)[: made.numel()].view(made.shape)


def parts_of(a: StepArguments) -> int:
    """Return how many parts a sample has."""
    return -(-_size(a) // PART)


def _size(a: StepArguments) -> int:
    return a.sample.numel() // a.sample.shape[0]


def _launch(a: StepArguments) -> None:
    assert a.program is not None
    assert a.parameters is not None
    batch, size, parts, made = a.sample.shape[0], _size(a), parts_of(a), _made(a)
    weighs_sample, terms = _weighs_sample(a), made.shape[1] - 1
    tensors = (*a.predictions, a.sample) if weighs_sample else tuple(a.predictions)
    strides = tuple(tensor.stride(0) if batch > 1 else max(tensor.stride(0), size) for tensor in tensors)
    others = (a.scratch, a.rows, a.weights, a.program, a.parameters, made, a.indices, a.cursor)
    instructions, number = (a.program.shape[1] - 1 - terms) // 4, a.parameters.shape[-1]
    numbers = (
        a.index, a.indices.stride(0) if a.indices is not None and a.indices.dim() else 0,
        0 if a.cursor is None else _stride_unless_one(a.cursor, 0), a.rows.shape[0], parts,
        _stride_unless_one(a.weights, 0), _stride_unless_one(a.weights, 1), _stride_unless_one(a.program, 0),
        instructions, _stride_unless_one(a.parameters, 0), _stride_unless_one(a.parameters, 1), number,
    )  # fmt: skip
    tiles = tiles_of(number_of_moments(terms) + len(OTHER_INPUTS) + number + instructions)
    constants = (terms, weighs_sample, size % PART == 0, PART, tiles)
    device = a.sample.device
    key = kind_of(device, (*tensors, *others), (*strides, size), numbers, constants)
    arguments = (tensors, strides, size, *others, *numbers, *constants)
    apart = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if apart else contextlib.nullcontext():
        _launch_compiled(key, batch * parts, arguments, device)


def _launch_compiled(key: tuple[Any, ...], programs: int, arguments: tuple[Any, ...], device: torch.device) -> None:
    kernel = _compiled.get(key)
    if kernel is not None:
        kernel[programs, 1, 1](*arguments)
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend: the Triton kernel that makes weights is not compiled for these arguments yet, and cannot be "
            "during a capture; run the step once before"
        )
    _compiled[key] = _compile_and_launch(programs, arguments)


def _compile_and_launch(programs: int, arguments: tuple[Any, ...]) -> Any:
    from . import triton_moments_kernel as kernels

    return kernels.moments_kernel[(programs, 1, 1)](*arguments, num_warps=WARPS, **OPTIONS)


def check_program(a: StepArguments) -> None:
    """Refuse what the kernels would read beyond its end, or as something else."""
    batch, count = a.sample.shape[0], a.weights.shape[-1] - 1
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
    numbers = scratch_numbers(made.shape[1] - 1, batch, _size(a))
    scratch = a.scratch
    if scratch is None and a.sample.device.type != "cpu":
        raise RuntimeError("scratch: expected a tensor with a program on a GPU, got None")
    if scratch is not None and (
        scratch.dtype != torch.float64 or not scratch.is_contiguous() or scratch.numel() < numbers
    ):
        raise RuntimeError(f"scratch: expected float64, contiguous, of at least {numbers}, got {_told(scratch)}")


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"


def tiles_of(values: int) -> int:
    """Return how many tiles hold a program's values: a power of two, as kernels are compiled for each."""
    return 1 << (-(-min(values, MOST_VALUES) // LANES) - 1).bit_length()


def _stride_unless_one(tensor: Tensor, dimension: int) -> int:
    return tensor.stride(dimension) if tensor.shape[dimension] > 1 else 0
