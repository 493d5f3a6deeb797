"""Write a guidance with vectors and numbers: symbols that a function is traced with, once, into a program.

A ``Vector`` is a linear combination of the predictions, which nobody computes. What is computed are its coefficients:
the weights of the predictions, made of numbers that each sample has one of, a ``Scalar`` each. Scalars come from inner
products of vectors, and these from the moments of the terms that all vectors are combinations of: the first prediction,
the differences of the others to it, and the sample. So the function itself says which moments it needs, and how it
makes weights.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

Number: TypeAlias = "float | Scalar"
Space: TypeAlias = Literal["prediction", "original"]
"""What a guidance takes predictions as."""

ROUNDING = 2.0**-50
"""What a vector's square is at least, over those of its terms: a sum of float64 that cancels below is all rounding."""

_MOST_FACTORS = 8
"""Of a power of a number."""
_SUPPORTED = (
    "sums, differences and multiples of vectors; v.dot, v.sum, v.norm and v.std of them; and +, -, *, /, whole powers, "
    "abs, v.sqrt, v.exp, v.minimum, v.maximum and v.where of the numbers that these give"
)


class Symbol:
    """What numpy and torch leave operations to, and refuse those of."""

    __slots__ = ()
    __array_ufunc__ = None
    """numpy's numbers leave their operators to it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> NoReturn:
        name = getattr(function, "__name__", function)
        raise TypeError(f"guidance: expected no torch.{name} of a {cls.__name__.lower()}; supported are {_SUPPORTED}")


class Scalar(Symbol):
    """One number for each sample, known when a step is made: an operation, and what it is of.

    Args:
        operation: of ``OPERATIONS``, or ``"input"``.
        operands: numbers and scalars, or the input's name.
    """

    __slots__ = ("operands", "operation")

    def __init__(self, operation: str, *operands: Any) -> None:
        self.operation, self.operands = operation, operands

    def __add__(self, other: Any) -> Number:
        return _scalar("add", self, other)

    def __radd__(self, other: Any) -> Number:
        return _scalar("add", other, self)

    def __sub__(self, other: Any) -> Number:
        return _scalar("sub", self, other)

    def __rsub__(self, other: Any) -> Number:
        return _scalar("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return other * self if isinstance(other, Vector) else _scalar("mul", self, other)

    def __rmul__(self, other: Any) -> Number:
        return _scalar("mul", other, self)

    def __truediv__(self, other: Any) -> Number:
        return _scalar("div", self, other)

    def __rtruediv__(self, other: Any) -> Number:
        return _scalar("div", other, self)

    def __neg__(self) -> Number:
        return _scalar("sub", 0.0, self)

    def __abs__(self) -> Number:
        return _scalar("maximum", self, -self)

    def __pow__(self, power: Any) -> Number:
        if type(power) is not int or not 1 <= power <= _MOST_FACTORS:
            raise TypeError(
                f"guidance: expected a power from 1 to {_MOST_FACTORS}, got {power!r}; supported are {_SUPPORTED}"
            )
        return functools.reduce(operator.mul, [self] * power)

    def __gt__(self, other: Any) -> Condition:
        return Condition(_scalar("sub", self, other))

    def __lt__(self, other: Any) -> Condition:
        return Condition(_scalar("sub", other, self))

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "guidance: expected no branch on a number that each sample has, as its value is not known while the "
            "function is traced; use v.where(a > b, x, y)"
        )

    def __float__(self) -> NoReturn:
        raise TypeError(
            "guidance: expected no number that is read on the host, as its value is not known while the function is "
            f"traced; supported are {_SUPPORTED}"
        )

    __int__ = __index__ = __float__

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"a number that each sample has, in a guidance, has no {name!r}; supported are {_SUPPORTED}"
        )


class Condition(NamedTuple):
    """Whether a number is above another one, for ``v.where``."""

    difference: Number

    def __bool__(self) -> NoReturn:
        raise TypeError("guidance: expected no branch on a comparison of numbers that each sample has; use v.where")


class Vector(Symbol):
    """A linear combination of the terms: the first prediction, the differences of the others to it, and the sample.

    Args:
        coefficients: one for each term.
    """

    __slots__ = ("coefficients",)

    def __init__(self, coefficients: Sequence[Number]) -> None:
        self.coefficients = tuple(coefficients)

    def _combined(self, other: Any, sign: int) -> Vector:
        if not isinstance(other, Vector):
            raise TypeError(
                f"guidance: expected a vector to be added to a vector, got {type(other).__name__}; supported are "
                f"{_SUPPORTED}"
            )
        operation = "add" if sign > 0 else "sub"
        return Vector([_scalar(operation, a, b) for a, b in zip(self.coefficients, other.coefficients, strict=True)])

    def __add__(self, other: Any) -> Vector:
        return self._combined(other, 1)

    def __sub__(self, other: Any) -> Vector:
        return self._combined(other, -1)

    def __radd__(self, other: Any) -> Vector:
        return self._combined(other, 1)

    def __mul__(self, other: Any) -> Vector:
        return Vector([_scalar("mul", a, _factor(other)) for a in self.coefficients])

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Vector:
        return Vector([_scalar("div", a, _factor(other)) for a in self.coefficients])

    def __neg__(self) -> Vector:
        return Vector([_scalar("sub", 0.0, a) for a in self.coefficients])

    def __abs__(self) -> NoReturn:
        raise TypeError(f"guidance: expected no abs of a vector, element by element; supported are {_SUPPORTED}")

    def __pow__(self, power: Any) -> NoReturn:
        raise TypeError(f"guidance: expected no power of a vector, element by element; supported are {_SUPPORTED}")

    def __bool__(self) -> NoReturn:
        raise TypeError("guidance: expected no branch on a vector, whose values nobody computes")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a vector of a guidance has no {name!r}; supported are {_SUPPORTED}")


OPERATIONS = {"add": 2, "sub": 2, "mul": 2, "div": 2, "sqrt": 1, "exp": 1, "minimum": 2, "maximum": 2, "where": 3}
"""Of scalars, with how many operands each has; ``where`` is its second operand if the first is above 0."""


_OF_FLOATS: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "minimum": min,
    "maximum": max,
}


UNIT_OF_STATE = 2.0**20
"""What a loop's sum of differences is kept as a multiple of.

The sum is the anchor of the predictions, and its squares are next to theirs in the moments; and it may be longer than
they are: of many calls, or of x_0, a difference of which is sigma / alpha times as long as that of epsilons. So it is
kept small, by a power of two, which rounds nothing."""


class Vectors:
    """What a guidance's function is given: the predictions, and what can be computed of them.

    Args:
        count: number of predictions.
        space: what the predictions are taken as: ``"prediction"``, what the model predicts; or ``"original"``, the
            x_0 that each of them says, ``x0_scale * (x0_sample * x + x0_pred * p)`` by the step's row; or the names of
            the inputs that multiply x and p.
        first_is_state: whether the first one is no prediction, but what a loop's steps have added up: differences of
            predictions, in this space, over ``UNIT_OF_STATE``.
    """

    def __init__(self, count: int, space: Space | tuple[str, str] = "prediction", first_is_state: bool = False) -> None:
        self._count, self._space, self._states = count, space, int(first_is_state)

    @property
    def predictions(self) -> tuple[Vector, ...]:
        """The predictions, in the order that the step takes them in: unconditional first."""
        own = [self._term(0), *(self._term(0) + self._term(number) for number in range(1, self._count))]
        states, own = [UNIT_OF_STATE * state for state in own[: self._states]], own[self._states :]
        if self._space == "prediction":
            return (*states, *own)
        return (*states, *(self._sample_part() + self._prediction_part() * prediction for prediction in own))

    @property
    def sample(self) -> Vector:
        """The sample x_t."""
        return self._term(self._count)

    def guided_prediction(self, result: Vector) -> Vector:
        """Return a function's result as a prediction of the model's."""
        if self._space == "prediction":
            return result
        return (result - self._sample_part()) / self._prediction_part()

    def _term(self, number: int) -> Vector:
        return Vector([float(term == number) for term in range(self._count + 1)])

    def _sample_part(self) -> Vector:
        if isinstance(self._space, tuple):
            return self.sample * Scalar("input", self._space[0])
        scale: Vector = Scalar("input", "x0_scale") * Scalar("input", "x0_sample") * self.sample
        return scale

    def _prediction_part(self) -> Number:
        if isinstance(self._space, tuple):
            return Scalar("input", self._space[1])
        return _scalar("mul", Scalar("input", "x0_scale"), Scalar("input", "x0_pred"))

    @property
    def numel(self) -> Scalar:
        """The number of elements of a sample."""
        return Scalar("input", "numel")

    @property
    def step(self) -> Scalar:
        """How many calls of the model the loop has made before."""
        return Scalar("input", "step")

    def dot(self, first: Vector, second: Vector) -> Number:
        """Return the inner product of two vectors, over all but the batch."""
        total: Number = 0.0
        for i, a in enumerate(_vector("v.dot", first)):
            for j, b in enumerate(_vector("v.dot", second)):
                moment = Scalar("input", f"dot_{min(i, j)}_{max(i, j)}")
                total = _scalar("add", total, _scalar("mul", _scalar("mul", a, b), moment))
        return total

    def sum(self, vector: Vector) -> Number:
        """Return the sum of a vector's elements."""
        total: Number = 0.0
        for i, a in enumerate(_vector("v.sum", vector)):
            total = _scalar("add", total, _scalar("mul", a, Scalar("input", f"sum_{i}")))
        return total

    def norm(self, vector: Vector) -> Number:
        """Return the Euclidean norm of a vector; of one whose terms cancel, no less than what their rounding hides."""
        squares, terms = self.dot(vector, vector), _vector("v.norm", vector)
        of_terms: Number = 0.0
        for number in [number for number, weight in enumerate(terms) if weight != 0.0]:
            moment = Scalar("input", f"dot_{number}_{number}")
            square = _scalar("mul", _scalar("mul", terms[number], terms[number]), moment)
            of_terms = _scalar("add", of_terms, square)
        return self.sqrt(self.maximum(squares, _scalar("mul", ROUNDING, of_terms)))

    def std(self, vector: Vector) -> Number:
        """Return the standard deviation of a vector's elements, over ``numel - 1``, as ``torch.std`` does.

        What cannot be told from the rounding of their sums in float64 counts as 0.
        """
        total, square = self.sum(vector), self.dot(vector, vector)
        squares = square - total * total / self.numel
        return self.sqrt(self.where(squares > 1e-13 * square, squares, 0.0) / (self.numel - 1.0))

    def sqrt(self, value: Number) -> Number:
        """Return the square root of a number."""
        return _scalar("sqrt", value)

    def exp(self, value: Number) -> Number:
        """Return e to the power of a number."""
        return _scalar("exp", value)

    def minimum(self, first: Number, second: Number) -> Number:
        """Return the lower of two numbers."""
        return _scalar("minimum", first, second)

    def maximum(self, first: Number, second: Number) -> Number:
        """Return the higher of two numbers."""
        return _scalar("maximum", first, second)

    def where(self, condition: Condition | bool, first: Any, second: Any) -> Any:
        """Return the first of two numbers or vectors where a comparison holds, else the second."""
        if isinstance(condition, bool):  # of numbers that are known
            return first if condition else second
        if not isinstance(condition, Condition):
            raise TypeError(f"v.where: expected a comparison such as a > b, got {type(condition).__name__}")
        if isinstance(first, Vector) and isinstance(second, Vector):
            pairs = zip(first.coefficients, second.coefficients, strict=True)
            return Vector([_scalar("where", condition.difference, a, b) for a, b in pairs])
        return _scalar("where", condition.difference, first, second)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"guidance: v has no {name!r}; supported are {_SUPPORTED}")


def _vector(name: str, value: Any) -> tuple[Number, ...]:
    if not isinstance(value, Vector):
        raise TypeError(f"{name}: expected a vector, got {type(value).__name__}")
    return value.coefficients


def _factor(value: Any) -> Number:
    if isinstance(value, Vector):
        raise TypeError(f"guidance: expected no product of two vectors, element by element; supported are {_SUPPORTED}")
    return _number(value)


def _number(value: Any) -> Number:
    if isinstance(value, Scalar):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"guidance: expected a number, got {type(value).__name__}; supported are {_SUPPORTED}")
    return float(value)


def _scalar(operation: str, *operands: Any) -> Number:
    """Return an operation of numbers, without those that change nothing."""
    numbers = [_number(operand) for operand in operands]
    if all(type(number) is float for number in numbers) and operation in _OF_FLOATS:
        return float(_OF_FLOATS[operation](*numbers))
    first = numbers[0]
    second = numbers[1] if len(numbers) > 1 else None
    if operation in ("add", "sub") and second == 0.0:
        return first
    if operation == "add" and first == 0.0:
        assert second is not None
        return second
    if (operation == "mul" and 0.0 in (first, second)) or (operation == "div" and first == 0.0):  # no term of a vector
        return 0.0
    if operation == "mul" and first == 1.0:
        assert second is not None
        return second
    if operation in ("mul", "div") and second == 1.0:
        return first
    return Scalar(operation, *numbers)
