"""View and join traced outputs: parts of them, other shapes, and what a pipeline puts side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from . import formula_rules as rules
from .at_once import at_once
from .formula import Formula, as_vector, general
from .formula import stacked as stacked_alone
from .halves import FIRST, SECOND
from .joined import Doubled, Joined
from .lazy_tensor import plain
from .remade import Tensors, are_of, key_of, remade
from .sums import Sum, as_sum
from .traced import Combined, Source, Term, Traced, seen_by_both

_new = object.__new__


def chunk(operand: Any, chunks: int, dim: int = 0) -> Any:
    """Return the parts; those of a whole output along its batch without making tensors of them."""
    if type(operand) is Joined:
        return operand.chunk(chunks, dim)
    if type(operand) is Traced and operand._value is operand.source.tensor and dim == 0:
        tensor = operand.source.tensor
        counted = type(chunks) is int and chunks > 1 and tensor.dim() > 0 and not tensor.requires_grad
        if counted and tensor.shape[0] % chunks == 0:
            source = operand.source
            if chunks == 2:
                return Traced(source, None, FIRST), Traced(source, None, SECOND)
            return tuple([Traced(source, None, (number, chunks)) for number in range(chunks)])
    return parts_of(lambda each: each.chunk(chunks, dim), operand, "chunk")


def halved(self: Traced, chunks: int, dim: int = 0) -> Any:
    """Return the parts of an output, as its method: mostly halves along the batch."""
    source = self.source
    if chunks == 2 and dim == 0 and self._value is source.tensor and source.is_linear:
        shape = source.tensor.shape
        if shape and shape[0] % 2 == 0:
            first, second = _new(Traced), _new(Traced)  # for half the price of calling the class
            first.source = second.source = source
            first._value = second._value = None
            first.piece, second.piece = FIRST, SECOND
            return first, second
    return chunk(self, chunks, dim)


def split(operand: Any, split_size: Any, dim: int = 0) -> Any:
    """Return the parts of a size, or of sizes."""
    if type(operand) is Joined:
        return operand.split(split_size, dim)
    return parts_of(lambda each: each.split(split_size, dim), operand, "split")


def view(operand: Any, name: str, how: tuple[Any, ...]) -> Any:
    """Return a view of an operand, as one of each of its terms."""
    how = plain(how)
    if type(operand) is Formula:
        made = rules.viewed(operand, name, how)
        if made is not None:
            return made
    parts = parts_of(lambda tensor: (getattr(tensor, name)(*how),), operand, name.strip("_"))
    return parts[0]


def parts_of(function: Callable[[Tensor], Any], operand: Any, by: str) -> Any:
    """Return parts of an operand, which a function of tensors makes: of each of its terms, if they are views."""
    if type(operand) is Formula:
        _make_ahead(operand)
    operand = general(operand)
    found = as_sum(operand)
    if found is None or (found[1] is not None and found[1].tensor.dim() > 0):
        return function(plain(operand, by))
    values = [of.value() for of, *_ in found[0]]
    made = [function(value) for value in values]
    if not all(_shares(part, value) for parts, value in zip(made, values, strict=True) for part in parts):
        return function(plain(operand, by))
    sources = [of.source for of, *_ in found[0]]
    traced = [[Traced(source, part) for part in parts] for source, parts in zip(sources, made, strict=True)]
    if type(operand) is Traced:
        return tuple(traced[0])
    return tuple(
        Combined(
            (lambda tensor, number=number: function(tensor)[number], operand),
            tuple((of, *term[1:]) for of, term in zip(pieces, found[0], strict=True)),
            found[1],
            operand.dtype,
            found[2],
            operand,
        )
        for number, pieces in enumerate(zip(*traced, strict=True))
    )


def _make_ahead(operand: Formula) -> None:
    """Make a formula, or what it is a view of, ahead of the step, if the kernels take it: once, for all parts."""
    while operand.base is not None:
        operand = operand.base
    if operand.is_pending() and as_vector(operand) is not None:
        ahead = at_once(operand)
        if ahead is not None:
            operand.become(ahead)


def _shares(part: Any, whole: Tensor) -> bool:
    if type(part) is not Tensor or part.dtype != whole.dtype:
        return False
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def joined(tensors: Any, dim: int = 0) -> Any:
    """Return ``torch.cat``: in the channels, of guidance and what the model returned besides; or of it, twice.

    Outputs that are joined, such as UniDiffuser's of pictures and texts, are an output.
    """
    if isinstance(tensors, (list, tuple)) and len(tensors) == 2:
        main, rest = general(tensors[0]), tensors[1]
        if dim == 0 and type(main) is Combined and tensors[1] is tensors[0] and main.is_pending():
            return Doubled(main)
        if dim == 1 and type(main) in (Combined, Doubled) and type(rest) is Traced and main.is_pending():
            if type(main) is Doubled and rest.value().shape[1] == 0:
                return Doubled(main.main)
            if _may_be_joined(main, rest):
                return Joined(main, rest)
    if isinstance(tensors, (list, tuple)) and _are_outputs(tensors):
        return _put_together(torch.cat([tensor.value() for tensor in tensors], dim), tensors)
    return torch.cat([plain(tensor, "cat") for tensor in tensors], dim)


def _put_together(tensor: Tensor, terms: Sequence[Traced]) -> Traced:
    """Return a tensor that is traced as the terms that it was copied from: it guides if any of them does."""
    first = terms[0].source
    source = Source(tensor, first.fusion, first.is_output, first.is_of_outputs)
    source.guides = any(term.source.guides for term in terms)
    return Traced(source, tensor)


def _are_outputs(tensors: Sequence[Any]) -> bool:
    """Tell whether all are outputs of the same pipeline."""
    if not tensors or type(tensors[0]) is not Traced:
        return False
    fusion = tensors[0].source.fusion
    return all(
        type(each) is Traced and each.source.is_output and each.source.may_wait() and each.source.fusion is fusion
        for each in tensors
    )


def _may_be_joined(main: Combined | Doubled, rest: Traced) -> bool:
    first, second = main.like().shape, rest.value().shape
    fits = len(first) == len(second) > 1 and first[:1] + first[2:] == second[:1] + second[2:]
    return fits and rest.source.may_wait() and main.dtype == rest.dtype


def stacked(tensors: Any, dim: int = 0) -> Any:
    """Return ``torch.stack``: of one sum, or of sums with the same coefficients, it is a sum of stacked terms.

    The second is what a pipeline guided one sample after the other, as Z-Image's does with a list of outputs.
    It is a copy, as torch's: writes to what was stacked change nothing, and are refused only where its values are
    made of more than the copied terms, as those of a view of a sum are.
    """
    if isinstance(tensors, (list, tuple)) and tensors:
        tensors = [general(tensor) for tensor in tensors]
        alone = stacked_alone(tensors[0]) if dim == 0 and len(tensors) == 1 and type(tensors[0]) is Formula else None
        if alone is not None:
            return alone
        sums = [as_sum(tensor) for tensor in tensors]
        if _are_alike(sums) and all(tensor.dtype == tensors[0].dtype for tensor in tensors):
            first, *others = sums
            seen = first[2]
            for each in others:
                seen = seen_by_both(seen, each[2])
            columns = list(zip(*[each[0] for each in sums], strict=True))
            terms = tuple([(_stacked_term([of for of, *_ in column], dim), *column[0][1:]) for column in columns])
            made_by = (lambda *tensors: torch.stack(tensors, dim)), *tensors
            keys = {key_of(of) for column in columns for of, *_ in column}
            if others and are_of(tensors, keys) and all(source.version() == version for source, version in seen):
                made_by = ((lambda: _restacked(tensors, columns, terms, dim)),)
                seen = tuple([(of.source, of.source.version()) for of, *_ in terms])
            return Combined(made_by, terms, first[1], tensors[0].dtype, seen)
    return torch.stack([plain(tensor, "stack") for tensor in tensors], dim)


def _restacked(tensors: Sequence[Any], columns: Any, terms: Sequence[Term], dim: int) -> Tensor:
    """Compute a stack of sums from the copies of their terms: later writes to the terms change nothing."""
    copies: Tensors = {}
    for column, (copied, *_) in zip(columns, terms, strict=True):
        parts = copied.value().unbind(dim)
        copies |= {key_of(of): part for (of, *_), part in zip(column, parts, strict=True)}
    return torch.stack([remade(tensor, copies) for tensor in tensors], dim)


def _are_alike(sums: Sequence[Sum | None]) -> TypeGuard[Sequence[Sum]]:
    """Tell whether sums have the same coefficients, and terms of the same pipeline, step, shape, dtype and device."""
    first = sums[0]
    if first is None or (first[1] is not None and (first[1].tensor.dim() > 0 or len(sums) > 1)):
        return False
    for each in sums[1:]:
        if each is None or each[1] is not None or [term[1:] for term in each[0]] != [term[1:] for term in first[0]]:
            return False
        for (left, *_), (right, *_) in zip(each[0], first[0], strict=True):
            if _kind_of(left) != _kind_of(right):
                return False
    return True


def _kind_of(term: Traced) -> tuple[Any, ...]:
    source, value = term.source, term.value()
    return source.fusion, source.step, source.is_output, value.shape, value.dtype, value.device


def _stacked_term(terms: Sequence[Traced], dim: Any) -> Traced:
    """Return a term of several samples: of one sample, a view; of more, a copy."""
    source = terms[0].source
    if len(terms) == 1:
        return Traced(source, terms[0].value().unsqueeze(dim))
    with torch.inference_mode(False):  # so that torch counts who writes to it: nobody does
        copied = torch.stack([term.value() for term in terms], dim)
    return _put_together(copied, terms)


def cloned(operand: Any, **how: Any) -> Any:
    """Return ``Tensor.clone``: an output is copied at once, as the next call may write to it."""
    if type(operand) is Traced and operand.source.is_output and not how:
        return _put_together(operand.value().clone(), (operand,))
    return plain(operand, "clone").clone(**how)
