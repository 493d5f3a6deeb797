"""Make a step's weights from moments by a Triton kernel that is launched before the step's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
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


class MakesWeights:
    """Launches the kernel that makes a step's weights; again, for other tensors of the same layouts and alignments."""

    def __init__(self, a: StepArguments) -> None:
        """Remember all of a step with a program, whose predictions are apart, but its sample and predictions."""
        made, program, parameters = a.made, a.program, a.parameters
        assert made is not None
        assert program is not None
        assert parameters is not None
        batch, terms, size = a.sample.shape[0], made.shape[1] - 1, a.sample.numel() // a.sample.shape[0]
        parts, number, instructions = -(-size // PART), parameters.shape[-1], (program.shape[1] - 1 - terms) // 4
        scratch = a.scratch
        if scratch is None:  # interpreted
            numbers = scratch_numbers(terms, batch, size)
            scratch = torch.zeros(numbers, dtype=torch.float64, device=a.sample.device)
        self._weighs_sample = terms > len(a.predictions)
        self._strides = tuple(
            tensor.stride(0) if batch > 1 else max(tensor.stride(0), size)
            for tensor in self._terms(a.sample, a.predictions)
        )
        self._size, self._programs, self._device = size, batch * parts, a.sample.device
        self._tensors = scratch, a.rows, a.weights, program, parameters, made
        self._numbers = (
            a.indices.stride(0) if a.indices is not None and a.indices.dim() else 0,
            0 if a.cursor is None else _stride_unless_one(a.cursor, 0), a.rows.shape[0], parts,
            _stride_unless_one(a.weights, 0), _stride_unless_one(a.weights, 1), _stride_unless_one(program, 0),
            instructions, _stride_unless_one(parameters, 0), _stride_unless_one(parameters, 1), number,
        )  # fmt: skip
        tiles = tiles_of(number_of_moments(terms) + len(OTHER_INPUTS) + number + instructions)
        self._constants = terms, self._weighs_sample, size % PART == 0, PART, tiles
        self._weights = made[None]
        if self._weighs_sample:  # then they lie where csrc/kernels/gpu/moments.h has them
            behind = scratch[batch * (parts * number_of_moments(terms) + 1) :].view(torch.float32)
            self._weights = behind[: made.numel()].view(1, *made.shape)
        self._kernel: Any = None

    def __call__(
        self, index: int, indices: Tensor | None, cursor: Tensor | None, sample: Tensor, predictions: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Launch it; return the weights and predictions of the step: if the sample has a weight, it is one more."""
        terms = self._terms(sample, predictions)
        tensors, numbers = (*self._tensors, indices, cursor), (index, *self._numbers)
        arguments = (terms, self._strides, self._size, *tensors, *numbers, *self._constants)
        device = self._device
        here = device.type != "cuda" or device.index == torch.cuda.current_device()
        if here and self._kernel is not None:
            self._kernel[self._programs, 1, 1](*arguments)
        else:
            key = kind_of(device, (*terms, *tensors), (*self._strides, self._size), numbers, self._constants)
            with contextlib.nullcontext() if here else torch.cuda.device(device):
                self._kernel = launch_compiled(
                    _compiled, key, self._programs, arguments, device, _compile_and_launch, "makes weights"
                )
        return self._weights, terms

    def step(self, a: StepArguments) -> StepArguments:
        """Return the arguments of the step that reads the weights, and has no program."""
        terms: Any = self._terms(a.sample, a.predictions)
        return a._replace(
            weights=self._weights, predictions=terms, program=None, parameters=None, made=None, scratch=None
        )

    def _terms(self, sample: Tensor, predictions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (*predictions, sample) if self._weighs_sample else tuple(predictions)


def launch_compiled(
    compiled: dict[tuple[Any, ...], Any],
    key: tuple[Any, ...],
    programs: int,
    arguments: tuple[Any, ...],
    device: torch.device,
    compile_and_launch: Callable[[int, tuple[Any, ...]], Any],
    what_it_does: str,
) -> Any:
    """Launch the kernel that was compiled for such arguments, or compile it; return it, if it is no interpreter's."""
    kernel = compiled.get(key)
    if kernel is not None:
        kernel[programs, 1, 1](*arguments)
        return kernel
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"backend: the Triton kernel that {what_it_does} is not compiled for these arguments yet, and cannot be "
            "during a capture; run the step once before"
        )
    kernel = compiled[key] = compile_and_launch(programs, arguments)
    return kernel


def _compile_and_launch(programs: int, arguments: tuple[Any, ...]) -> Any:
    from . import triton_moments_kernel as kernels

    return kernels.moments_kernel[(programs, 1, 1)](*arguments, num_warps=WARPS, **OPTIONS)


def check_program(a: StepArguments) -> None:
    """Refuse what the kernels would read beyond its end, or as something else."""
    batch, count = a.sample.shape[0], a.weights.shape[-1] - 1
    program, parameters, made = a.program, a.parameters, a.made
    elements = a.sample.numel() // batch
    if program is None or parameters is None or made is None:
        raise RuntimeError("program: expected program, parameters and made together")
    if program.dtype != torch.int32 or not program.is_contiguous() or program.shape[0] not in (1, batch):
        raise RuntimeError(f"program: expected int32 of shape (1 or {batch}, words), got {_told(program)}")
    groups = max(len(made) // batch, 1)
    if (
        made.dtype != torch.float32
        or not made.is_contiguous()
        or made.dim() != 2
        or made.shape[1] not in (count + 1, count + 2)
        or len(made) not in (batch, batch * groups)
        or elements % groups
    ):
        raise RuntimeError(
            f"made: expected float32 of shape ({batch}, {count + 1} or one more), or as many rows for each sample as "
            f"divide its {elements} elements, got {_told(made)}"
        )
    steps = a.rows.shape[0]
    if (
        parameters.dtype != torch.float64
        or parameters.dim() != 3
        or parameters.shape[0] not in (1, steps)
        or parameters.shape[1] not in (1, batch)
        or not parameters.is_contiguous()
    ):
        expected = f"float64 of shape ({steps} or 1, {batch} or 1, numbers), contiguous"
        raise RuntimeError(f"parameters: expected {expected}, got {_told(parameters)}")
    terms = made.shape[1] - 1
    if not 2 <= terms <= MOST_TERMS:
        raise RuntimeError(f"program: expected 2 to {MOST_TERMS} terms to make weights of, got {terms}")
    if program.shape[1] <= terms:
        raise RuntimeError(f"program: expected at least {1 + terms} words for {terms} terms, got {program.shape[1]}")
    if groups > 1:
        return
    numbers = scratch_numbers(terms, batch, elements)
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
