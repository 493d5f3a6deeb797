"""What a pipeline's variables hold, as far as its source says: above all, what became of the models' predictions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

ABOUT = frozenset(
    ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_floating_point", "requires_grad", "__len__")
)
"""What a tensor is asked for without being computed with."""
CASTS = frozenset(("to", "float", "half", "double", "bfloat16", "type", "type_as", "cpu"))
SHAPES = frozenset(
    (
        "view",
        "reshape",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "stack",
        "cat",
        "concat",
    )
)
SPLITS = frozenset(("split", "unbind", "tensor_split"))


@dataclass(frozen=True, eq=False)
class Node:
    """A tensor that was made of a model's predictions, and how."""

    kind: str
    """``"call"`` of a model, ``"output"`` (the first) or ``"another output"`` of a call, ``"part"`` of a batch, an
    operator's name, ``"scale"`` (an operand without predictions), ``"either"`` of two, ``"guider"`` (what one gives),
    ``"embedded"`` (an input of the model that is the scale); or what was done: ``"cast"``, ``"slice"``, ``"split"``,
    ``"shape"``, ``"negate"``, ``"written"`` to, taken ``"one by one"``, ``"function"``."""
    parts: tuple[Node, ...] = ()
    detail: str = ""
    """The model, the function, which part, or what is particular about a scale."""

    def walk(self) -> Iterator[Node]:
        """Yield this and everything that it was made of, each once."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                waiting += reversed(node.parts)


@dataclass(frozen=True)
class Known:
    """A value that is the same whatever the pipeline is given: a literal, or the default of an argument."""

    value: Any


@dataclass(frozen=True)
class Component:
    """A part of the pipeline, such as a model or a scheduler, or one of several."""

    names: tuple[str, ...]


@dataclass(eq=False)
class Many:
    """A tuple or list."""

    elements: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class Function:
    """A function that a method defines within itself."""

    tree: ast.FunctionDef


@dataclass(frozen=True)
class Unknown:
    """Anything else, and what is particular about it."""

    note: str = ""


Value: TypeAlias = Node | Known | Component | Many | Function | Unknown
UNKNOWN = Unknown()
PER_FRAME = Unknown("per frame")
"""A scale that has a value for each frame."""
ZEROS = Unknown("zeros")
MASK = Unknown("mask")
"""A factor that has a value for each element."""


def same(one: Node, other: Node) -> bool:
    """Tell whether two nodes are one tensor."""
    one, other = output_of(one), output_of(other)
    if one is other:
        return True
    if one.kind in ("call", "scale") or (one.kind, one.detail, len(one.parts)) != (
        other.kind,
        other.detail,
        len(other.parts),
    ):
        return False
    if one.kind == "output":
        return one.parts[0] is other.parts[0]
    return all(same(mine, theirs) for mine, theirs in zip(one.parts, other.parts, strict=True))


def output_of(value: Node) -> Node:
    """Return the tensor that a call of a model returns first; any other node as it is."""
    return Node("output", (value,)) if value.kind == "call" else value


def nodes_in(*values: Value) -> tuple[Node, ...]:
    """Return the predictions in values, in their order."""
    found: list[Node] = []
    for value in values:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, Many):
            found += nodes_in(*value.elements)
    return tuple(found)


def joined(one: Value, other: Value) -> Value:
    """Return what holds after two branches; where only one has a prediction, that counts."""
    if one is other or one == other:
        return one
    if isinstance(one, Node) and isinstance(other, Node):
        return one if same(one, other) or _are_calls_of_one_model(one, other) else Node("either", (one, other))
    if isinstance(one, Component) and isinstance(other, Component):
        return Component(tuple(dict.fromkeys((*one.names, *other.names))))
    if isinstance(one, Many) and isinstance(other, Many) and len(one.elements) == len(other.elements):
        return Many([joined(a, b) for a, b in zip(one.elements, other.elements, strict=True)])
    for value in (one, other):
        if isinstance(value, Component) or value == PER_FRAME or nodes_in(value):
            return value
    return UNKNOWN


def _are_calls_of_one_model(one: Node, other: Node) -> bool:
    """Tell whether two nodes are the model's outputs themselves, of its calls in two branches."""
    one, other = output_of(one), output_of(other)
    return one.kind == other.kind == "output" and one.parts[0].detail == other.parts[0].detail


def merged(one: Mapping[str, Value], other: Mapping[str, Value]) -> dict[str, Value]:
    """Return the variables after two branches."""
    return {**one, **{name: joined(one[name], value) if name in one else value for name, value in other.items()}}


def any_of(value: Value) -> Value:
    """Return what a loop over a value has in hand, or what an unknown index of it gives."""
    if isinstance(value, Many) and value.elements:
        result, *others = value.elements
        for other in others:
            result = joined(result, other)
        return result
    return Node("one by one", (value,)) if isinstance(value, Node) else UNKNOWN


def taken(value: Value, number: int, of: int | str = "?") -> Value:
    """Return one of the parts that a value is unpacked into."""
    if isinstance(value, Many):
        return value.elements[number] if number < len(value.elements) else any_of(value)
    if not isinstance(value, Node):
        return UNKNOWN
    if value.kind == "call":
        return Node("another output", (value,)) if number else output_of(value)
    if value.kind == "batch":
        return Node("part", value.parts, f"{number} of {of}")
    return Node(
        "split" if value.kind == "split" else "slice", value.parts if value.kind == "split" else (value,), str(number)
    )


def operation(operator: str, one: Value, other: Value) -> Value:
    """Return what an operator makes of two values."""
    parts = nodes_in(one, other)
    if not parts:
        return PER_FRAME if PER_FRAME in (one, other) else UNKNOWN
    operands = [
        output_of(found[0])
        if (found := nodes_in(value))
        else Node("scale", (), value.note if isinstance(value, Unknown) else "")
        for value in (one, other)
    ]
    return Node(operator, tuple(operands))


def of_tensor(value: Node, name: str, given: Sequence[Value], named: Mapping[str, Value]) -> Value:
    """Return what a method of a tensor gives."""
    if name in ABOUT:
        return UNKNOWN
    if name in SPLITS:
        return Node("split", (value,))
    if name == "chunk":
        return _chunks(output_of(value), given, named)
    kind = "cast" if name in CASTS else "shape" if name in SHAPES else "function"
    return Node(kind, (value, *nodes_in(*given, *named.values())), name)


def _chunks(value: Node, given: Sequence[Value], named: Mapping[str, Value]) -> Value:
    count = named.get("chunks", given[0] if given else UNKNOWN)
    if named.get("dim", given[1] if len(given) > 1 else Known(0)) != Known(0):
        return Node("split", (value,))
    if isinstance(count, Known) and isinstance(count.value, int):
        return Many([Node("part", (value,), f"{number} of {count.value}") for number in range(count.value)])
    return Node("batch", (value,))
