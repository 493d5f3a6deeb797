"""Know the words of programs that are on a device, where no host reads them.

Kernels that are compiled for a program need its words on the host. Who copies a program to a device says what it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .encoded import MOST_VALUES, OTHER_INPUTS, number_of_moments
from .symbols import OPERATIONS

_ARITIES = tuple(OPERATIONS.values())
_known: Any = WeakIdKeyDictionary()
"""By the tensor: the words, and the version of its memory that they are of."""


def remember(program: Tensor, words: tuple[int, ...]) -> None:
    """Remember the words of a program on a device, int32 of shape (1, words), as long as the tensor lives."""
    _known[program] = words, _version(program)


def words_of(program: Tensor) -> tuple[int, ...]:
    """Return a program's words, which are all samples'.

    Of one that is not remembered the host reads them, which waits for a device that it is on: there is no other way, as
    a kernel cannot be compiled for words that nobody knows. So it is of a program that others than the library have
    made, at its first step, after each write to it, and at each step if it is an inference tensor, of which torch
    counts no writes. Guidance's own programs are remembered, and never read on a device.

    Raises:
        RuntimeError: samples have other programs than each other, or a device would have to be read during a capture.
    """
    found, version = _known.get(program, (None, None))
    if found is not None and version is not None and version == _version(program):
        words: tuple[int, ...] = found
        return words
    if program.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("program: expected one that a step was made with before the capture; run the step once")
    each = {tuple(words) for words in program.tolist()}
    if len(each) != 1:
        raise RuntimeError(
            f"program: expected the same for all samples, as weights are of groups of elements, got {len(each)}"
        )
    (words,) = each
    remember(program, words)
    return words


def _version(program: Tensor) -> int | None:
    return None if program.is_inference() else program._version


def moments_read(words: tuple[int, ...], terms: int) -> tuple[bool, ...]:
    """Tell for each moment of so many terms whether a program reads it."""
    read = set(words[1 : 1 + terms])
    for begin in range(1 + terms, 1 + terms + 4 * words[0], 4):
        read |= set(words[begin + 1 : begin + 1 + _ARITIES[words[begin]]])
    return tuple([moment in read for moment in range(number_of_moments(terms))])


def check_words(words: tuple[int, ...], terms: int, parameters: int) -> None:
    """Refuse words that are no program of so many terms, parameters and constants.

    Raises:
        RuntimeError: an instruction is none, or reads a value that is not there before it.
    """
    inputs = number_of_moments(terms) + len(OTHER_INPUTS) + parameters
    count, room = words[0], min((len(words) - 1 - terms) // 4, MOST_VALUES - inputs)
    if not 0 <= count <= room:
        raise RuntimeError(f"program: expected 0 to {room} instructions in its {len(words)} words, got {count}")
    for n in range(count):
        operation, *operands = words[1 + terms + 4 * n :][:4]
        if not 0 <= operation < len(_ARITIES) or not all(0 <= place < inputs + n for place in operands):
            got = (operation, *operands)
            raise RuntimeError(f"program: expected an operation of values before it as instruction {n}, got {got}")
    weights = words[1 : 1 + terms]
    if not all(0 <= place < inputs + count for place in weights):
        raise RuntimeError(f"program: expected weights among its {inputs + count} values, got {weights}")
