"""Launch the Triton step whose groups of elements have weights of their own, which the same kernel makes."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...guidance.words import check_words, moments_read, words_of
from ..operator import StepArguments
from .triton import BLOCK, OPTIONS, WARPS, Shape, kind_of
from .triton_moments import launch_compiled

_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by what each was compiled for, as those of the step."""


class Tile(NamedTuple):
    """How groups of so many elements are dealt out. It depends on nothing else, nor does the order of their sums."""

    rows: int
    """Groups of a Triton program, a power of two."""
    width: int
    """Elements of each that it has at once, a power of two; a group of more is several tiles."""
    unit: int
    """The largest power of two up to 16 that divides a group's elements."""

    @classmethod
    def of(cls, elements: int) -> Tile:
        """Return the tile of groups of so many elements."""
        width = min(1 << (elements - 1).bit_length(), 4 * BLOCK)
        return cls(max(BLOCK // width, 1), width, min(elements & -elements, 16))

    @property
    def warps(self) -> int:
        """Return how many warps a Triton program has: eight elements a thread."""
        return self.rows * self.width * WARPS // BLOCK


class StepsGroups:
    """Launches the step; again, for other tensors of the same layouts and alignments."""

    def __init__(self, a: StepArguments) -> None:
        """Remember all of a step with a program, whose predictions are apart, but its tensors of elements."""
        made, program, parameters = a.made, a.program, a.parameters
        assert made is not None
        assert program is not None
        assert parameters is not None
        batch, count = len(a.sample), len(a.predictions)
        groups, terms, number = len(made) // batch, made.shape[1] - 1, parameters.shape[-1]
        elements = a.sample.numel() // (batch * groups)
        self._shape, self._device = Shape.of(a), a.sample.device
        tile, words = Tile.of(elements), words_of(program)
        read = _checked(words, terms, number)
        self._tensors = parameters, made
        self._numbers = (
            parameters.stride(0) if parameters.shape[0] > 1 else 0, parameters.stride(1) if parameters.shape[1] > 1
            else 0, groups, elements // tile.unit,
        )  # fmt: skip
        single, whole = elements <= tile.width, elements % tile.width == 0
        even = whole and groups % tile.rows == 0
        contiguous = whole if tile.rows > 1 else elements % 4 == 0
        noise, _, _, counted, _, ptx, _ = self._shape.constants
        self._constants = (
            noise, count, terms > count, counted, ptx, even, contiguous, single, tile.unit, tile.rows, tile.width,
            number, words[0], read, words,
        )  # fmt: skip
        self._programs = batch * -(-groups // tile.rows)
        self._kernel: Any = None

    def __call__(self, row: int, tensors: tuple[Any, ...]) -> None:
        """Launch it: the row, and all tensors of the step's kernel, in its order."""
        shape, device = self._shape, self._device
        of_kernel, (*strides, size, threads), numbers, _ = shape.arguments(row, tensors)
        numbers = (*numbers, *self._numbers)
        arguments = (
            of_kernel, tuple(strides), size, threads, *numbers[: -len(self._numbers)], *self._tensors, *self._numbers,
            *self._constants,
        )  # fmt: skip
        here = device.type != "cuda" or device.index == torch.cuda.current_device()
        if here and self._kernel is not None:
            self._kernel[self._programs, 1, 1](*arguments)
            return
        every: list[Tensor | None] = [*tensors[:4], *tensors[4], *tensors[5:], *self._tensors]
        specialized = (*strides[:4], *strides[4], *strides[5:], size, threads)
        key = kind_of(device, every, specialized, numbers, self._constants)
        with contextlib.nullcontext() if here else torch.cuda.device(device):
            self._kernel = launch_compiled(
                _compiled, key, self._programs, arguments, device, _compile_and_launch, "steps groups of elements"
            )


@lru_cache(maxsize=256)
def _checked(words: tuple[int, ...], terms: int, parameters: int) -> tuple[bool, ...]:
    """Return which moments a program reads, which is one for so many terms and parameters."""
    check_words(words, terms, parameters)
    return moments_read(words, terms)


def _compile_and_launch(programs: int, arguments: tuple[Any, ...]) -> Any:
    from . import triton_groups_kernel as kernels

    return kernels.grouped_step_kernel[(programs, 1, 1)](*arguments, num_warps=warps_of(arguments), **OPTIONS)


def warps_of(arguments: tuple[Any, ...]) -> int:
    """Return how many warps a launch's programs have."""
    *_, unit, rows, width, _, _, _, _ = arguments
    return Tile(rows, width, unit).warps
