"""Write a program down for the kernels, as words, and read it again: the layout of csrc/maths/program.h.

A program computes with a row of values: the moments of its terms, ``OTHER_INPUTS``, its parameters and constants, and
behind them what its instructions make, one value each. A word names an operation or the place of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .program import Instruction, Program, Value
from .symbols import OPERATIONS

MOST_TERMS = 4
"""The most terms of a program: predictions, and the sample."""
MOST_VALUES = 256
"""The most values of a program."""
PART = 4096
"""Elements of a sample that are added up in the arithmetic's own precision."""
OTHER_INPUTS = ("numel", "step", "x0_scale", "x0_sample", "x0_pred")
"""Behind the moments: a sample's number of elements, the calls that its loop has made, and how its row makes x_0."""

_OPERATIONS = tuple(OPERATIONS)
_INSTRUCTION_WORDS = 4


class Encoded(NamedTuple):
    """A program as kernels read it."""

    words: tuple[int, ...]
    """The number of instructions, the places of the terms' weights, and four words for each instruction."""
    constants: tuple[float, ...]
    """Behind the parameters."""


def moment_names(terms: int) -> tuple[str, ...]:
    """Return the names of the moments of so many terms, in their order."""
    products = [f"dot_{i}_{j}" for i in range(terms) for j in range(i, terms)]
    return (*products, *(f"sum_{i}" for i in range(terms)))


def number_of_moments(terms: int) -> int:
    """Return how many moments so many terms have."""
    return terms * (terms + 3) // 2


def scratch_numbers(terms: int, batch: int, elements: int) -> int:
    """Return how many numbers of 8 bytes a GPU's kernel needs: ``scratch_words`` of csrc/kernels/gpu/moments.h."""
    parts = -(-elements // PART)
    return batch * (parts * number_of_moments(terms) + 1 + terms + 1)


def group_scratch_numbers(batch: int, elements: int) -> int:
    """Return the same where groups have weights: ``group_scratch_words`` of csrc/kernels/gpu/groups.h."""
    return batch + (batch * elements + 1) // 2


def encode(program: Program, parameters: Sequence[str]) -> Encoded:
    """Write a program down.

    Args:
        program: has a weight for each term.
        parameters: the names of those inputs that are parameters, in the order that kernels have them in.

    Raises:
        ValueError: it is too large for the kernels.
    """
    terms = len(program.weights)
    if terms > MOST_TERMS:
        raise ValueError(f"predictions: expected at most {MOST_TERMS} to make weights from, got {terms}")
    operands = [operand for instruction in program.instructions for operand in instruction.operands]
    constants = tuple({float(what): None for kind, what in (*operands, *program.weights) if kind == "constant"})
    inputs = (*moment_names(terms), *OTHER_INPUTS, *parameters)
    places: dict[Value, int] = {("input", name): place for place, name in enumerate(inputs)}
    places |= {("constant", number): len(inputs) + k for k, number in enumerate(constants)}
    first = len(inputs) + len(constants)
    if first + len(program.instructions) > MOST_VALUES:
        raise ValueError(
            f"guidance: expected a function of at most {MOST_VALUES} values, those that it computes with included, got "
            f"{first + len(program.instructions)}"
        )

    def place(operand: Value) -> int:
        return first + int(operand[1]) if operand[0] == "step" else places[operand]

    words = [len(program.instructions), *(place(weight) for weight in program.weights)]
    for operation, read in program.instructions:
        unused = [0] * (_INSTRUCTION_WORDS - 1 - len(read))
        words += [_OPERATIONS.index(operation), *(place(operand) for operand in read), *unused]
    return Encoded(tuple(words), constants)


def decode(words: Sequence[int], terms: int, parameters: int) -> Program:
    """Return a program again, whose parameters and constants have the names ``parameter_0`` and so on."""
    inputs = (*moment_names(terms), *OTHER_INPUTS, *(f"parameter_{k}" for k in range(parameters)))

    def value(place: int) -> Value:
        return ("input", inputs[place]) if place < len(inputs) else ("step", place - len(inputs))

    def instructions() -> Iterator[Instruction]:
        for begin in range(1 + terms, 1 + terms + _INSTRUCTION_WORDS * words[0], _INSTRUCTION_WORDS):
            operation = _OPERATIONS[words[begin]]
            read = words[begin + 1 : begin + 1 + OPERATIONS[operation]]
            yield Instruction(operation, tuple([value(place) for place in read]))

    weights = tuple([value(place) for place in words[1 : 1 + terms]])
    return Program(tuple(instructions()), weights, inputs)
