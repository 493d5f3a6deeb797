"""Know again what a pipeline makes of its models' outputs, and what a step takes of it: most steps are like the last.

To find out what an operation makes takes Python several microseconds, and a formula of guidance has ten of them. So
each operation is told by its rule, its numbers and what its operands were made by, down to the places of outputs among
those of the step. One that was met at an earlier step makes a ``Known``, which only notes its operands; and the step
finds the weights by what the last operation is. For any other use, a ``Known`` makes what the rule does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from .halves import FIRST, SECOND, OfHalves
from .lazy_tensor import LazyTensor, plain
from .taken import Taken, Weights
from .traced import Source, Traced, Waiting, check_version

_MOST = 1024
"""Operations that a pipeline's are told among, before all are forgotten."""
_HASHED = frozenset((bool, int, str, type(None), torch.dtype, torch.device))
_NUMBERS = itertools.count()
_new = object.__new__

Leaves = dict[Any, Traced]
"""Outputs, and parts of them, by their places."""


class Recipe:
    """An operation that was met, and what it made; two of the same are one object."""

    __slots__ = ("dtype", "is_view", "shape", "taken")

    def __init__(self, made: Waiting) -> None:
        self.shape: torch.Size = made.shape
        self.dtype = made.dtype
        self.is_view = made.base is not None
        """Whether it shares its memory with its first operand."""
        self.taken: dict[torch.Size, Any] = {}
        """What a step has taken of it, by the shape of the sample."""


class Known(LazyTensor):
    """What an operation makes that was met at an earlier step."""

    __slots__ = ("_made", "leaves", "made_by", "recipe", "source")
    # set by ``known``, as a call of __init__ takes as long as half of the rest

    made_by: tuple[Any, ...]
    """The rule, its operands, and the rule's keywords."""
    recipe: Recipe
    leaves: Leaves
    source: Source
    """Of one of the leaves."""
    _made: Any

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""
        return self.recipe.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor that it stands for."""
        return self.recipe.dtype

    @property
    def device(self) -> torch.device:
        """That of the tensor that it stands for."""
        return self.source.tensor.device

    @property
    def ndim(self) -> int:
        """How many dimensions the tensor has that it stands for."""
        return len(self.recipe.shape)

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        made = self.made()
        like: Tensor = made if isinstance(made, Tensor) else made.like()
        return like

    def made(self) -> Any:
        """Return what the rule makes of the operands, the same each time.

        Raises:
            RuntimeError: an output has been written to since.
        """
        if self._made is None:
            check_leaves(self.leaves)
            rule, operands, keywords = self.made_by
            made = self._made = rule(*map(unknown if self.recipe.is_view else _unseen, operands), **keywords)
            if isinstance(made, Waiting) and made.recipe is None:
                made.recipe, made.leaves, made.source = self.recipe, self.leaves, self.source
        return self._made

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor, for any use, the same one each time; ``by``: the operation that asks."""
        value: Tensor = plain(self.made(), by)
        return value


def unknown(operand: Any) -> Any:
    """Return what a known operand is; any other as it is."""
    return operand.made() if type(operand) is Known else operand


def _unseen(operand: Any) -> Any:
    """Return an operand of a known operation as it was at the time: without what others have written to its values."""
    if type(operand) is Known:
        made = operand.made()
        if not isinstance(made, Waiting):  # made of values that others had, which may also be what others have
            rule, operands, keywords = operand.made_by
            return rule(*map(_unseen, operands), **keywords)
        operand = made
    waiting = operand._general if type(operand) is OfHalves else operand
    if isinstance(waiting, Waiting) and not waiting.is_pending() and waiting.may_be_written():
        return waiting.value()
    return operand


def check_leaves(leaves: Leaves) -> None:
    """Refuse outputs that have been written to since they were first used.

    Raises:
        RuntimeError: one has.
    """
    for leaf in leaves.values():
        check_version(leaf.source, leaf.source.form[1])


def known(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule that knows the operations again which it was asked for."""

    @functools.wraps(rule)
    def again(*operands: Any, **keywords: Any) -> Any:
        told = _told(rule, operands, keywords)
        if told is None:
            return rule(*[unknown(each) for each in operands], **keywords)
        key, leaves, source, recipes = told
        recipe = recipes.get(key)
        if recipe is not None:
            made = _new(Known)
            made._value = made._made = None
            made.made_by, made.recipe, made.leaves, made.source = (rule, operands, keywords), recipe, leaves, source
            return made
        made = rule(*[unknown(each) for each in operands], **keywords)
        if isinstance(made, Waiting) and made.recipe is None and made.is_pending():
            if len(recipes) >= _MOST:
                recipes.clear()
            made.recipe = recipes[key] = Recipe(made)
            made.leaves, made.source = leaves, source
        return made

    return again


def _told(
    rule: Callable[..., Any], operands: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Leaves, Source, dict[Any, Recipe]] | None:
    """Return what tells an operation from others, its outputs, the source of one, and those that were met.

    ``None``: nothing tells it, as tensors are among the operands, or outputs that may be written to unseen.
    """
    key: list[Any] = [rule]
    leaves: Leaves | None = None
    source: Source | None = None
    for operand in operands:
        kind = type(operand)
        if kind is float:
            key.append(operand if operand != 0.0 else str(operand))  # 0.0 equals -0.0
            continue
        if kind is Known or isinstance(operand, Waiting):
            if operand.recipe is None or not _may_wait(operand):
                return None
            sign, own, of = operand.recipe, operand.leaves, operand.source
        elif kind is Traced or kind is OfHalves:
            found = _leaf(operand) if kind is Traced else _halves(operand)
            if found is None:
                return None
            sign, own, of = found
        else:
            sign = _hashable(operand)
            if sign is None:
                return None
            key.append(sign)
            continue
        key.append(sign)
        if source is None:
            leaves, source = own, of
        elif of.fusion is not source.fusion or of.step != source.step:
            return None
        elif own is not leaves:
            leaves = {**leaves, **own}  # type: ignore[dict-item]
    fusion = None if source is None else source.fusion
    if source is None or leaves is None or fusion is None or source.step != fusion.steps:
        return None
    for name, value in keywords.items():
        sign = _hashable(value)
        if sign is None:
            return None
        key += (name, sign)
    return tuple(key), leaves, source, fusion.known


def _hashable(value: Any) -> Any:
    """Return what a value that is no tensor is told by; ``None``: it cannot be."""
    kind = type(value)
    if kind in _HASHED or kind is float:
        return kind, (value if kind is not float or value != 0.0 else str(value))
    if kind in (list, tuple, torch.Size) and all([type(each) is int for each in value]):  # noqa: C419
        return kind, *value
    return None


def _leaf(operand: Traced) -> tuple[Any, Leaves, Source] | None:
    source = operand.source
    form = source.form
    if form is None:
        form = _formed(source)
    if form is False or source.tensor._version != form[1]:
        return None
    if operand.piece is not None:
        place: Any = (form[0], operand.piece)
    elif operand._value is source.tensor:
        place = (form[0],)
    else:
        value = operand.value()
        place = form[0], value.storage_offset(), value.shape, value.stride(), value.dtype
    return place, {place: operand}, source


def _halves(operand: OfHalves) -> tuple[Any, Leaves, Source] | None:
    source, general = operand.uncond.source, operand._general
    form = source.form
    if form is None:
        form = _formed(source)
    if form is False or not operand.version == form[1] == source.tensor._version or operand.scale == 0.0:
        return None
    if general is not None and not general.is_pending():
        return None
    leaves = {(form[0], FIRST): operand.uncond, (form[0], SECOND): operand.cond}
    return (form[0], operand.form, operand.scale), leaves, source


def _formed(source: Source) -> Any:
    """Give an output, when it is first used in a step, its place among those of the step, and its version then.

    Returns:
        A number for its place, layout, dtype and device, and the version; ``False``: an output that may be written to
        unseen, that shares its memory with another one, or of an earlier step.
    """
    fusion, tensor = source.fusion, source.tensor
    source.form = False
    if fusion is None or not source.is_linear or not source.is_output or not source.is_of_outputs or source.guides:
        return False
    if tensor.is_inference() or source.step != fusion.steps:
        return False
    if fusion.used_at != source.step:
        fusion.used_at, fusion.used = source.step, []
    memory = tensor.untyped_storage().data_ptr()
    if memory in fusion.used or memory == 0:
        return False
    fusion.used.append(memory)
    layout = tensor.shape, tensor.stride(), tensor.storage_offset(), source.alone
    form = len(fusion.used), *layout, tensor.dtype, tensor.device
    forms = fusion.forms
    if len(forms) >= _MOST:
        forms.clear()
        fusion.known.clear()
    number = forms.get(form)
    if number is None:
        number = forms[form] = next(_NUMBERS)
    source.form = number, tensor._version
    return source.form


def taken_again(output: Any, sample: Tensor, take: Callable[[Any, Tensor], Any]) -> Any:
    """Return what a step takes of a pipeline's combination, which may be known from an earlier step.

    Args:
        output, sample: of ``take``.
        take: returns the output taken apart, see ``taken_apart`` in lazy_guidance.py.

    Raises:
        RuntimeError: an output has been written to since it was first used.
    """
    recipe = output.recipe if type(output) is Known or isinstance(output, Waiting) else None
    if recipe is None or not _may_wait(output):
        return take(unknown(output), sample)
    note = recipe.taken.get(sample.shape)
    if note is not None:
        check_leaves(output.leaves)
        given: Any = note.given(output.leaves)
        return given
    found = take(unknown(output), sample)
    note = None if found is None else _Note.of(found, output.leaves)
    if note is not None:
        recipe.taken[sample.shape] = note
    return found


class _Note(NamedTuple):
    """What a step takes of a combination, by the places of outputs."""

    places: tuple[tuple[Any, bool], ...]
    """Of each prediction, and whether it is the whole output that a part is of."""
    dtype: torch.dtype | None
    """The combination's, of several predictions; ``None``: it is one tensor."""
    weights: Any

    def given(self, leaves: Leaves) -> tuple[Any, Any]:
        """Return the same of outputs of this step."""
        tensors = [leaves[place].source.tensor if whole else leaves[place].value() for place, whole in self.places]
        if self.dtype is None:
            return tensors[0], self.weights
        return Taken(tuple(tensors), None, self.dtype), self.weights

    @classmethod
    def of(cls, found: tuple[Any, Any], leaves: Leaves) -> _Note | None:
        """Return what was found by its places; ``None``: it has tensors that are none of the outputs."""
        output, weights = found
        if not (weights is None or type(weights) is float or isinstance(weights, (Guidance, Weights))):
            return None
        if isinstance(weights, Weights) and weights.scale is not None:
            return None
        tensors = (output,) if isinstance(output, Tensor) else output.predictions
        places = [_place_of(each, leaves) for each in tensors]
        if None in places or (isinstance(output, Taken) and output.variance is not None):
            return None
        return cls(tuple(places), None if isinstance(output, Tensor) else output.dtype, weights)  # type: ignore[arg-type]


def _place_of(tensor: Tensor, leaves: Leaves) -> tuple[Any, bool] | None:
    for place, leaf in leaves.items():
        if leaf.value() is tensor:
            return place, False
    for place, leaf in leaves.items():
        if leaf.source.tensor is tensor:
            return place, True
    return None


def _may_wait(operand: Any) -> bool:
    """Tell whether nobody has seen the values of an operand with a recipe."""
    if type(operand) is Known:
        if operand._made is None:
            return not operand.recipe.is_view or _may_wait(operand.made_by[1][0])
        operand = operand._made
    elif type(operand) is OfHalves:
        return operand._general is None or operand._general.is_pending()
    return isinstance(operand, Waiting) and operand.is_pending()
