"""Say which operations of torch's make formulas: of norms, inner products and deviations, and of what these scale.

Norms and sums are of samples, over all dimensions but the batch, for one sample over all dimensions; or of tokens and
other groups, over some dimensions of a sample. Each function here returns ``None`` where an operation is none of a
formula, or computes the tensors and says for what.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import formula
from .formula import (
    NUMBER,
    PRODUCT,
    VECTOR,
    Formula,
    Groups,
    Spans,
    as_vector,
    have_spans_in_common,
    is_number,
    is_one_a_sample,
    lies_in_order,
    promoted,
    sizes_of,
    spans_of,
)
from .lazy_tensor import plain
from .traced import (
    LARGEST,
    ScaleAsSeen,
    Source,
    Traced,
    Waiting,
    beside,
    copied_beside,
    own_value,
    state_of_outputs,
)

# ---- Arithmetic ----


def number_of(value: Any) -> float | None:
    """Return a number of Python's or numpy's, or of a tensor on the host that has no dimensions; ``None``: it is none.

    A tensor's is read at once: writes to it afterwards change nothing.
    """
    if type(value) is not float:
        if type(value) is Tensor:
            if value.dim() or not value.is_cpu or value.requires_grad or not value.is_floating_point():
                return None
        elif not isinstance(value, Real) or isinstance(value, bool):
            return None
        value = float(value)
    return value if abs(value) < LARGEST else None


def as_read(value: Any) -> Any:
    """Return a value as it was when its number was read."""
    return value.clone() if type(value) is Tensor else value


def _as_number(value: Any, beside: Any) -> tuple[Any, Any] | None:
    """Return a number beside a vector or number as an operand, and as what computes with it; ``None``: it is none."""
    if isinstance(value, Waiting):
        return (value, value) if is_number(value) else None
    number = number_of(value)
    if number is not None:
        return number, as_read(value)
    if type(value) is not Tensor or value.requires_grad or not value.is_floating_point():
        return None
    if value.dim() > 0 and not (value.device == beside.device and is_one_a_sample(value.shape, sizes_of(beside))):
        return None
    seen = ScaleAsSeen.of(value)
    return seen, seen.tensor


def combined(operation: str, function: Callable[..., Any], first: Any, second: Any) -> Any:
    """Return ``"add"``, ``"sub"``, ``"mul"`` or ``"div"`` of two operands; ``None``: it is none of formulas."""
    left, right = as_vector(first), as_vector(second)
    if left is None and right is None:
        return _of_numbers(operation, function, first, second)
    if left is not None and right is not None:
        return _of_vectors(operation, function, left, right)
    if operation in ("add", "sub"):
        if left is None:
            left = tensor_beside(first, right)
        else:
            right = tensor_beside(second, left)
        return None if left is None or right is None else _of_vectors(operation, function, left, right)
    found, other = (left, second) if left is not None else (right, first)
    number = _as_number(other, found)
    if number is None or (operation == "div" and (left is None or (type(number[0]) is float and number[0] == 0))):
        return None
    operand, reads = number
    sizes, of_number = sizes_of(found), sizes_of(operand)
    if not (is_one_a_sample(of_number, sizes) or of_number == sizes or _is_of_groups(operand, sizes)):
        return None
    operands, made_by = (found, operand), (function, found, reads)
    if left is None:
        operands, made_by = (operand, found), (function, reads, found)
    return _of_one_step(VECTOR, operation, operands, made_by, sizes)


def _of_vectors(operation: str, function: Callable[..., Any], left: Any, right: Any) -> Any:
    sizes = sizes_of(left)
    if sizes != sizes_of(right) or operation == "div" or not _are_alike(left, right):
        return None
    operands = left, right
    kind, operation = (PRODUCT, "product") if operation == "mul" else (VECTOR, operation)
    return _of_one_step(kind, operation, operands, (function, left, right), sizes)


def _of_one_step(
    kind: int, operation: str, operands: tuple[Any, ...], made_by: tuple[Any, ...], sizes: torch.Size
) -> Any:
    """Return a formula; of operands of several steps, its tensor: a state, such as momentum's, would grow at each.

    ``None``: their norms are of different elements, or of groups of a vector in another shape.
    """
    if not have_spans_in_common(operands[0], operands[-1]):
        return None
    if kind != NUMBER:
        spans = spans_of(operands[0]) or spans_of(operands[-1])
        if spans and spans.sizes != sizes:
            return None
    sources = [_source_of(each) for each in operands if isinstance(each, (Traced, Waiting))]
    if kind == PRODUCT or all([each.step == sources[0].step for each in sources]):  # noqa: C419
        return Formula(kind, operation, operands, made_by, sizes, promoted(operands))
    function, *of = made_by
    with torch.inference_mode(False):  # so that torch counts who writes to it
        value = function(*map(own_value, of))
    return value if kind == NUMBER else state_of_outputs(value, sources[0].fusion)


def tensor_beside(value: Any, operand: Any) -> Traced | None:
    """Return a tensor of the pipeline's that may be added to an operand, such as its latents; ``None``: it is none.

    Where torch does not count who writes to it, it is copied: see ``copied_beside``.
    """
    if type(value) is not Tensor or value.requires_grad or not value.is_floating_point():
        return None
    source = _source_of(operand)
    if value.shape != sizes_of(operand) or value.device != source.tensor.device or value.dim() < 2:
        return None
    if value.is_inference():
        return copied_beside(value, source)
    made = beside(value, source.fusion)
    made.source.step = source.step  # another scheduler of the pipeline may have made a step since
    return made


def _is_of_groups(number: Any, sizes: torch.Size) -> bool:
    """Tell whether a number of each token, or of another group, multiplies the groups of a vector of this shape."""
    spans = spans_of(number)
    if not spans:
        return False
    return sizes_of(number) == torch.Size([1 if k in spans.dims else size for k, size in enumerate(sizes)])


def _are_alike(left: Any, right: Any) -> bool:
    """Tell whether two vectors are of the same pipeline, device, and number of samples."""
    first, second = _source_of(left), _source_of(right)
    return first.fusion is second.fusion and first.tensor.device == second.tensor.device


def _source_of(operand: Any) -> Source:
    return operand.source if type(operand) is Traced else operand.seen[0][0]


def _of_numbers(operation: str, function: Callable[..., Any], first: Any, second: Any) -> Any:
    own = next((each for each in (first, second) if is_number(each)), None)
    if own is None:
        return None
    left, right = _as_number(first, own), _as_number(second, own)
    if left is None or right is None:
        return None
    sizes = _common(sizes_of(left[0]), sizes_of(right[0]))
    if sizes is None:
        return None
    operands = left[0], right[0]
    return _of_one_step(NUMBER, operation, operands, (function, left[1], right[1]), sizes)


def _common(first: torch.Size, second: torch.Size) -> torch.Size | None:
    """Return the shape of what two numbers of each sample make; ``None``: samples would meet."""
    if first == second or len(second) == 0:
        return first
    if len(first) == 0:
        return second
    alike = len(first) == len(second) and first[0] == second[0]
    return torch.broadcast_shapes(first, second) if alike or 1 in (first.numel(), second.numel()) else None


def negative(operand: Any) -> Any:
    """Return an operand times -1."""
    return combined("mul", lambda tensor, _: operator.neg(tensor), operand, -1.0)


def power(first: Any, second: Any) -> Any:
    """Return a square of a vector, which waits for its sum, or of a number."""
    if number_of(second) == 2:
        read = as_read(second)
        made = combined("mul", lambda tensor, _: operator.pow(tensor, read), first, first)
        if made is not None:
            return made
    return operator.pow(plain(first, "pow"), plain(second, "pow"))


# ---- Functions of numbers ----


def of_number(operation: str) -> Callable[..., Any]:
    """Return the rule of a function of one number."""
    function = getattr(torch, operation)

    def rule(operand: Any) -> Any:
        if not is_number(operand):
            return function(plain(operand, operation))
        return Formula(NUMBER, operation, (operand,), (function, operand), operand.sizes, operand.dtype)

    return rule


def of_two_numbers(operation: str) -> Callable[..., Any]:
    """Return the rule of ``minimum`` or ``maximum``."""
    function = getattr(torch, operation)

    def rule(first: Any, second: Any) -> Any:
        made = None if number_of(first) is not None else _of_numbers(operation, function, first, second)
        return function(plain(first, operation), plain(second, operation)) if made is None else made

    return rule


def clamped(operand: Any, min: Any = None, max: Any = None) -> Any:
    """Return ``torch.clamp`` of a number."""
    if not is_number(operand):
        return plain(operand, "clamp").clamp(plain(min), plain(max))
    made: Any = operand
    for operation, name, bound in (("maximum", "clamp_min", min), ("minimum", "clamp_max", max)):
        if bound is None:
            continue
        number = number_of(bound)
        if number is None:
            return operand.computed("clamp").clamp(plain(min), plain(max))
        function = getattr(torch, name)
        made = Formula(NUMBER, operation, (made, number), (function, made, number), operand.sizes, operand.dtype)
    return made


def ones(operand: Any, **how: Any) -> Any:
    """Return ``torch.ones_like``, of which numbers are made."""
    given = as_vector(operand)
    if how or given is None:
        return torch.ones_like(plain(operand, "ones_like"), **how)
    return Formula(NUMBER, "constant", (given,), (torch.ones_like, given), sizes_of(given), given.dtype)


# ---- Sums over a sample ----


_DIMENSIONS = frozenset(("dim", "keepdim"))


def _given(names: Sequence[str], arguments: tuple[Any, ...], keywords: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a function's arguments by name; none, if it has others than these, or lazy ones.

    ``most``: how many of them may be given without their names.
    """
    given = dict(zip(names, arguments, strict=False)) | keywords
    known = len(arguments) <= most and set(given) <= set(names)
    return given if known and not any(isinstance(value, Waiting) for value in given.values()) else {}


def _summed(sizes: torch.Size, dim: Any, keepdim: Any) -> tuple[torch.Size, Spans] | None:
    """Return the shape of a sum over these dimensions, and what it is over; ``None``: it is none of each sample's."""
    return _summed_over(sizes, () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim), bool(keepdim))


@functools.lru_cache(maxsize=256)
def _summed_over(sizes: torch.Size, dims: tuple[Any, ...], keepdim: bool) -> tuple[torch.Size, Spans] | None:
    count = len(sizes)
    if count < 2 or 0 in sizes or not all(isinstance(each, int) and -count <= each < count for each in dims):
        return None
    summed = sorted({each % count for each in dims or range(count)})
    if len(summed) != len(dims or sizes) or (0 in summed and sizes[0] != 1):
        return None
    made = torch.Size([1 if k in summed else size for k, size in enumerate(sizes) if keepdim or k not in summed])
    if all(k in summed or sizes[k] == 1 for k in range(1, count)):
        return made, ()
    return (made, Groups(sizes, tuple(summed))) if keepdim and 0 not in summed else None


def _of_all(sizes: torch.Size, keepdim: bool) -> tuple[torch.Size, Spans]:
    """Return the same of all elements of a sample that has no dimension for the batch."""
    return torch.Size([1] * len(sizes) if keepdim else []), Groups(sizes, tuple(range(len(sizes))))


def _named(name: str, given: dict[str, Any]) -> str:
    """Return what an operation is called where it computes guidance."""
    dim = given.get("dim")
    if dim is None:
        return name
    dims = [str(each) for each in ((dim,) if isinstance(dim, int) else dim)]
    return f"{name} over dim {', '.join(dims)}"


def reduction(
    name: str, operation: str, names: Sequence[str], needed: dict[str, tuple[Any, ...]], kind: int = VECTOR
) -> Callable[..., Any]:
    """Return the rule of a sum over each sample.

    Args:
        name: of torch's function, ``"linalg.vector_norm"`` for example.
        operation: of a program.
        names: of its arguments behind the tensor, in their order.
        needed: values that other arguments than ``dim`` and ``keepdim`` may have.
        kind: what it sums: vectors, or products as well.
    """
    function: Any = operator.attrgetter(name)(torch)
    short = name.rpartition(".")[2]

    def rule(operand: Any, *arguments: Any, **keywords: Any) -> Any:
        if operation == "std" and arguments and type(arguments[0]) is bool:
            arguments = (None, *arguments)
        given, known = keywords, True
        if arguments or not keywords.keys() <= _DIMENSIONS:
            given = _given((*names, *needed.keys() - set(names)), arguments, keywords, len(names))
            known = bool(given) and all(
                key in _DIMENSIONS or value in needed.get(key, ()) for key, value in given.items()
            )
        summed = as_vector(operand)
        if kind == PRODUCT and type(operand) is Formula and operand.kind == PRODUCT and operand.is_pending():
            summed = operand
        if summed is not None and known:
            dim, keepdim = given.get("dim"), given.get("keepdim", False)
            found = _summed(sizes_of(summed), dim, keepdim)
            if found is None and dim is None and _source_of(summed).alone:
                found = _of_all(sizes_of(summed), bool(keepdim))
            if found is not None and spans_of(summed) in (None, found[1]):
                made_by = (lambda tensor: function(tensor, *arguments, **keywords)), summed
                return Formula(NUMBER, operation, (summed,), made_by, found[0], summed.dtype, found[1])
        by = _named(short, given)
        return function(plain(operand, by), *plain(arguments, by), **plain(keywords, by))

    return rule


def normalized(operand: Any, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: Any = None) -> Any:
    """Return ``torch.nn.functional.normalize``: a vector over its norm, or over eps."""
    function, given, least = torch.nn.functional.normalize, as_vector(operand), number_of(eps)
    found = None if given is None else _summed(sizes_of(given), dim, True)
    known = found is not None and spans_of(given) in (None, found[1]) and p == 2 and out is None
    if found is None or least is None or not known:
        by = _named("normalize", {"dim": dim})
        return function(plain(operand, by), plain(p), dim, plain(eps), plain(out))
    eps, (sizes, spans) = as_read(eps), found
    norm = Formula(NUMBER, "norm", (given,), (lambda t: t.norm(2, dim, keepdim=True), given), sizes, given.dtype, spans)
    length = Formula(NUMBER, "maximum", (norm, least), (torch.clamp_min, norm, least), sizes, given.dtype)
    return Formula(
        VECTOR, "div", (given, length), (lambda t: function(t, p, dim, eps), given), sizes_of(given), given.dtype
    )


# ---- Shapes and dtypes ----

KEEP_ORDER = frozenset(("flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"))
"""Views that leave elements in their order."""


def viewed(operand: Formula, name: str, how: tuple[Any, ...]) -> Any:
    """Return a formula in another shape: of vectors, each sample's elements in their order; ``None``: it is none."""

    def function(tensor: Tensor) -> Any:
        return getattr(tensor, name)(*how)

    if operand.is_pending() and operand.kind != PRODUCT:
        made = function(torch.empty(operand.sizes, dtype=operand.dtype, device="meta"))
        if type(made) is Tensor and made.dtype == operand.dtype and _keeps(operand, name, how, made.shape):
            return formula.viewed(operand, made.shape, function)
    return None


def _keeps(operand: Formula, name: str, how: tuple[Any, ...], sizes: torch.Size) -> bool:
    """Tell whether a view of this shape has the same samples, and the same groups if it is of any."""
    if operand.spans:
        return sizes == operand.sizes and name in KEEP_ORDER
    if operand.kind == NUMBER:
        of = sizes_of(operand.of)
        if sizes.numel() != operand.sizes.numel():
            return False
        if sizes.numel() == 1:
            return True
        return sizes[:1] == of[:1] and (name in KEEP_ORDER or _leaves_numbers_in_order(operand, name, how))
    alike = sizes[:1] == operand.sizes[:1] and sizes.numel() == operand.sizes.numel() and len(sizes) > 1
    return alike and name in KEEP_ORDER and lies_in_order(operand.of.like())


def _leaves_numbers_in_order(operand: Formula, name: str, how: tuple[Any, ...]) -> bool:
    """Tell whether a view of as many numbers has each at its own sample."""
    if name == "__getitem__":
        (index,) = how
        picked = index if type(index) is tuple else (index,)
        return all(each is None or each is Ellipsis or type(each) in (int, slice) for each in picked)
    return operand.sizes.numel() == operand.sizes[0] or name in ("narrow", "select")


def cast(operand: Formula, dtype: Any) -> Any:
    """Return a formula in another dtype."""
    if not operand.is_pending() or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return operand.computed("to").to(dtype)
    return formula.cast(operand, dtype)
