"""Trace a guidance's function into a straight-line program, which makes the weights of a sample from its moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .quotients import quotient, sqrt
from .spaces import PREDICTION, SAMPLE, TableSpace
from .symbols import OPERATIONS, Number, Scalar, Space, Vector, Vectors

Value = tuple[str, int | float | str]
"""An operand: ``("input", name)``, ``("constant", number)``, or ``("step", index)`` of an earlier instruction."""


class Instruction(NamedTuple):
    """One operation of a program."""

    operation: str
    operands: tuple[Value, ...]


class Program(NamedTuple):
    """Instructions, and the weights that they end in.

    A weight is the coefficient of a term: of the first prediction, which is the sum of all predictions' weights, of
    each difference of another one to it, and of the sample, where the program has to do with it.
    """

    instructions: tuple[Instruction, ...]
    weights: tuple[Value, ...]
    inputs: tuple[str, ...]
    """The moments and parameters that it reads, by name."""

    def where(self, name: str, others: Sequence[float]) -> Program:
        """Return a program whose weights are other ones unless an input is above 0; beyond those, they are 0."""
        first = len(self.instructions)
        numbers = [*others, *[0.0] * (len(self.weights) - len(others))]
        chosen = [
            Instruction("where", (("input", name), weight, ("constant", number)))
            for weight, number in zip(self.weights, numbers, strict=True)
        ]
        weights = tuple([("step", first + k) for k in range(len(chosen))])
        return Program((*self.instructions, *chosen), weights, (*self.inputs, name))

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor | float]:
        """Return the weights, each of the shape that its inputs broadcast to, or a number.

        ``inputs``: the moments and parameters, by name.
        """
        made: list[Any] = []

        def value(operand: Value) -> Any:
            kind, what = operand
            if kind == "input":
                return inputs[str(what)]
            return made[int(what)] if kind == "step" else what

        for operation, operands in self.instructions:
            made.append(_OF_TENSORS[operation](*[value(operand) for operand in operands]))
        return [value(operand) for operand in self.weights]


def _minimum(first: Any, second: Any) -> Tensor:
    """Return the lower of two; a number is not made a tensor, which would copy it to the device."""
    if not isinstance(first, Tensor):
        first, second = second, first
    lower: Tensor = torch.minimum(first, second) if isinstance(second, Tensor) else first.clamp(max=second)
    return lower


def _maximum(first: Any, second: Any) -> Tensor:
    """Return the higher of two; likewise."""
    if not isinstance(first, Tensor):
        first, second = second, first
    higher: Tensor = torch.maximum(first, second) if isinstance(second, Tensor) else first.clamp(min=second)
    return higher


_OF_TENSORS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": quotient,
    "sqrt": sqrt,
    "exp": torch.exp,
    "minimum": _minimum,
    "maximum": _maximum,
    "where": lambda condition, a, b: torch.where(condition > 0, a, b),
}
assert _OF_TENSORS.keys() == OPERATIONS.keys()


def input_of(parameter: str) -> str:
    """Return what a parameter is called among a program's inputs, whose other names it may have."""
    return f"parameter {parameter}"


def traced(
    function: Callable[..., Vector],
    count: int,
    parameters: Sequence[str],
    options: Mapping[str, Any],
    space: Space | TableSpace = "prediction",
    first_is_state: bool = False,
) -> Program:
    """Trace a guidance's function.

    Args:
        function: called with ``Vectors``, a symbol for each parameter, and the options; returns a vector.
        count: number of predictions.
        parameters: names of those that may differ between steps and samples.
        options: what is the same for all.
        space: what the function gets the predictions as.
        first_is_state: whether the first one is no prediction, but a sum of differences of such over ``UNIT_OF_STATE``.

    Raises:
        TypeError: it returns no vector, or does what a program cannot.
    """
    symbols = {name: Scalar("input", input_of(name)) for name in parameters}
    of_inputs = (input_of(SAMPLE), input_of(PREDICTION)) if isinstance(space, TableSpace) else space
    v = Vectors(count, of_inputs, first_is_state)
    result = function(v, **symbols, **options)
    if not isinstance(result, Vector):
        name = getattr(function, "__name__", "the function")
        raise TypeError(f"guidance: expected {name} to return a vector, got {type(result).__name__}")
    writer = _Writer()
    weights = tuple([writer.value(coefficient) for coefficient in v.guided_prediction(result).coefficients])
    of_sample = {f"sum_{count}", *(f"dot_{term}_{count}" for term in range(count + 1))}
    if weights[count] == ("constant", 0.0) and not of_sample & writer.inputs.keys():
        weights = weights[:count]
    return Program(tuple(writer.instructions), weights, tuple(writer.inputs))


class _Writer:
    """Write instructions down, each once."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.inputs: dict[str, None] = {}
        self._written: dict[Instruction, Value] = {}
        self._values: dict[int, Value] = {}
        """By the identity of symbols, all of which live until the program is written."""

    def value(self, number: Number) -> Value:
        """Return the operand that stands for a number, with the instructions that make it written before."""
        waiting = [number]
        while waiting:
            latest = waiting[-1]
            missing = [each for each in _operands(latest) if isinstance(each, Scalar) and id(each) not in self._values]
            if missing:
                waiting += reversed(missing)
            else:
                self._write(waiting.pop())
        return self._value(number)

    def _value(self, number: Number) -> Value:
        return self._values[id(number)] if isinstance(number, Scalar) else ("constant", number)

    def _write(self, number: Number) -> None:
        if not isinstance(number, Scalar) or id(number) in self._values:
            return
        if number.operation == "input":
            (name,) = number.operands
            self.inputs[name] = None
            self._values[id(number)] = "input", name
            return
        instruction = Instruction(number.operation, tuple([self._value(each) for each in number.operands]))
        found = self._written.get(instruction)
        if found is None:
            found = self._written[instruction] = "step", len(self.instructions)
            self.instructions.append(instruction)
        self._values[id(number)] = found


def _operands(number: Number) -> tuple[Any, ...]:
    """Return what has to be written before a number."""
    return number.operands if isinstance(number, Scalar) and number.operation != "input" else ()
