"""Take a formula apart for a step: predictions, and guidance that makes their weights from moments by a program.

What a pipeline computes at each step has the same structure, and mostly the same numbers. So a program is traced and
written down once for each structure, all numbers being its parameters, and a guidance is made once for these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ..guidance import Guidance
from ..guidance.moment_weights import MomentWeights
from ..guidance.scales import as_scale, stand_in_columns
from ..guidance.symbols import Scalar, Vector, Vectors
from .formula import Formula
from .formula_terms import Terms
from .traced import EXACT, WRITTEN_TO, ScaleAsSeen, Traced, check_version

_MOST_STRUCTURES, _MOST_NUMBERS = 64, 256

Entry = tuple[Any, ...]
"""Of a structure: what an operand is, and the places of what it is made of, or of its numbers."""


_NUMBER, _LEAF = ("number",), ("leaf",)


class Conversion(Guidance):
    """The weights of one model's output and of tensors that were added to it: nothing that guides."""


class Ahead(Guidance):
    """The weight of guidance that was made ahead of the step."""


class _Made(NamedTuple):
    """What was made of one structure."""

    weights: MomentWeights
    guidances: dict[Any, tuple[Guidance, tuple[ScaleAsSeen, ...]]]
    """By the numbers, with the tensors whose identity is among them."""


def taken_apart(output: Formula, sample: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Guidance] | None:
    """Return predictions, or one tensor of both, and guidance of a vector; ``None``: the kernels do not take it.

    Raises:
        RuntimeError: what it is made of has been written to since.
    """
    read = _Read(output)
    read.check_unchanged(output)
    whole = read.terms.whole(sample)
    is_whole = whole is not None and whole.dtype == output.dtype
    predictions = whole if is_whole else read.terms.tensors_like(sample)
    fusion = output.seen[0][0].fusion
    if predictions is None or fusion is None or len(read.terms) < 2:
        return None
    spans = output.spans
    if spans and (spans.sizes != sample.shape or 0 in spans.dims):
        return None
    made = fusion.guidances.get(read.key)
    if made is None:
        if len(fusion.guidances) >= _MOST_STRUCTURES:
            fusion.guidances.clear()
        values = _values(read)
        if values is None:
            return None
        made = fusion.guidances[read.key] = _first(read, values)
    if made.weights is None:
        return None
    numbers: tuple[Any, ...] = tuple(read.numbers)
    if read.scales:
        numbers = *numbers, *((id(scale.tensor), scale.version) for scale in read.scales)
    found = made.guidances.get(numbers)
    if found is None:
        if len(made.guidances) >= _MOST_NUMBERS:
            made.guidances.clear()
        values = _values(read)
        if values is None:
            return None
        found = made.guidances[numbers] = _guidance(made.weights, read, values), tuple(read.scales)
    return predictions, found[0]


def _values(read: _Read) -> dict[str, float | Tensor] | None:
    """Return what a program is given; ``None``: a scale is not finite, which says nothing of others."""
    values: dict[str, float | Tensor] = {f"number_{k}": number for k, number in enumerate(read.numbers)}
    try:
        for k, scale in enumerate(read.scales):
            values[f"scale_{k}"] = as_scale("guidance_scale", scale.tensor.reshape(-1))
    except ValueError:
        return None
    return values


def _guidance(weights: MomentWeights, read: _Read, values: dict[str, float | Tensor]) -> Guidance:
    make = Guidance if read.terms.outputs > 1 else Conversion
    return make(stand_in_columns(len(read.terms), values.values()), None, weights.with_parameters(values))


def _first(read: _Read, values: dict[str, float | Tensor]) -> Any:
    """Trace a structure's program."""
    try:
        function = _function_of(read.structure, read.entries)
        weights = MomentWeights.of(function, len(read.terms), values, dims=read.dims)
    except ValueError:  # too large for the kernels
        return _Made(None, {})  # type: ignore[arg-type]
    return _Made(weights, {})


class _Read:
    """What a vector is made of, as entries of its structure, and the numbers that these are not told apart by."""

    def __init__(self, output: Formula) -> None:
        self.structure: list[Entry] = []
        self.numbers: list[float] = []
        self.scales: list[ScaleAsSeen] = []
        self._leaves: list[Any] = []
        self._places: dict[int, int] = {}
        """In the structure, of operands by identity, all of which the output keeps alive."""
        self._place(output)
        self.terms = Terms(self._leaves)
        self.entries = [self._entry(*each) for each in zip(self._leaves, self.terms.weights, strict=True)]
        """Of the outputs and sums."""
        self.dims = output.spans.dims if output.spans else None
        self.key = len(self.terms), self.terms.outputs, self.dims, tuple(self.structure), tuple(self.entries)

    def check_unchanged(self, output: Formula) -> None:
        """Refuse what is not as it was when it was used."""
        for source, version in output.seen:
            check_version(source, version)
        for scale in self.scales:
            if scale.is_changed():
                raise RuntimeError(f"the scale of guidance {WRITTEN_TO}")

    def _place(self, operand: Any) -> int:  # without comprehensions, each of which is a call
        kind, structure = type(operand), self.structure
        if kind is float:
            self.numbers.append(operand)
            structure.append(_NUMBER)
            return len(structure) - 1
        place = self._places.get(id(operand))
        if place is not None:
            return place
        if kind is Formula:
            operation, operands = operand.operation, operand.operands
            first = self._place(operands[0]) if operation != "constant" else 0
            if operation == "same":
                self._places[id(operand)] = first
                return first
            if len(operands) == 2:
                entry: Entry = (operation, first, self._place(operands[1]))
            else:
                entry = (operation, first) if operation != "constant" else (operation,)
        elif kind is ScaleAsSeen:
            entry = "scale", self._scale(operand)
        else:
            self._leaves.append(operand)
            entry = _LEAF
        place = self._places[id(operand)] = len(structure)
        structure.append(entry)
        return place

    def _scale(self, scale: ScaleAsSeen) -> int:
        for place, other in enumerate(self.scales):
            if other.is_same(scale):
                return place
        self.scales.append(scale)
        return len(self.scales) - 1

    def _entry(self, leaf: Any, weights: dict[Any, tuple[float, float]]) -> Entry:
        """Return the term that an output is, or the terms of a sum.

        Of a sum, the numbers are its weights in all, and of each term but the first: constants, and then factors of a
        scale.
        """
        number = self.terms.number
        if type(leaf) is Traced:
            (key,) = weights
            return (number[key],)
        scale = None if leaf.scale is None else self._scale(leaf.scale)
        total, others = 0.0, {}
        for key, weight in weights.items():
            total += weight[0]
            if number[key]:
                others[number[key]] = weight
        order = tuple(sorted(others))
        self.numbers.append(1.0 if abs(total - 1.0) <= EXACT else total)
        for k in order:
            self.numbers.append(others[k][0])
        if scale is not None:
            self.numbers.append(sum([factor for _, factor in weights.values()]))
            self.numbers += [others[k][1] for k in order]
        return scale, order


# ---- Tracing ----


def _function_of(structure: list[Entry], entries: list[Entry]) -> Callable[..., Vector]:
    """Return a structure as a function that a program is traced of."""

    def function(v: Vectors, **parameters: Scalar) -> Vector:
        numbers = iter([value for name, value in parameters.items() if name.startswith("number")])
        given = [next(numbers) for entry in structure if entry is _NUMBER]
        leaves = iter([_leaf(v, entry, numbers, parameters) for entry in entries])
        constants = iter(given)
        made: list[Any] = []
        for operation, *operands in structure:
            if operation == "number":
                made.append(next(constants))
            elif operation == "leaf":
                made.append(next(leaves))
            elif operation == "scale":
                made.append(parameters[f"scale_{operands[0]}"])
            elif operation == "constant":
                made.append(1.0)
            else:
                made.append(_OPERATIONS[operation](v, *[made[place] for place in operands]))
        result: Vector = made[-1]
        return result

    return function


def _leaf(v: Vectors, entry: Entry, numbers: Iterator[Scalar], parameters: dict[str, Scalar]) -> Vector:
    """Return an output, or the sum whose weights are the next numbers."""
    if len(entry) == 1:
        return v.predictions[entry[0]]
    scale, others = entry
    weights: list[Any] = [next(numbers) for _ in range(len(others) + 1)]
    if scale is not None:
        weights = [weight + next(numbers) * parameters[f"scale_{scale}"] for weight in weights]
    base = v.predictions[0]
    total: Vector = base * weights[0]
    for number, weight in zip(others, weights[1:], strict=True):
        total = total + (v.predictions[number] - base) * weight
    return total


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda v, a, b: a + b,
    "sub": lambda v, a, b: a - b,
    "mul": lambda v, a, b: a * b,
    "div": lambda v, a, b: a / b,
    "product": lambda v, a, b: (a, b),
    "sum": lambda v, a: v.dot(*a) if isinstance(a, tuple) else v.sum(a),
    "norm": lambda v, a: v.norm(a),
    "std": lambda v, a: v.std(a),
    "sqrt": lambda v, a: v.sqrt(a),
    "exp": lambda v, a: v.exp(a),
    "minimum": lambda v, a, b: v.minimum(a, b),
    "maximum": lambda v, a, b: v.maximum(a, b),
}
