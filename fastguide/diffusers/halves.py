"""Stand for classifier-free guidance of the two halves of one output, as most pipelines write it, with few objects.

``uncond + scale * (cond - uncond)`` is three operations, and a ``Combined`` for each takes longer than the step that
follows. So their results are of this class as long as nothing else is done with them; for anything else, they become
combinations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .lazy_tensor import LazyTensor
from .traced import LARGEST, Combined, Term, Traced

DIFFERENCE, SCALED, GUIDED = range(3)
"""``cond - uncond``, that times a number, and ``uncond`` and that."""
FIRST, SECOND = (0, 2), (1, 2)
"""The halves, which ``chunk`` gives these very tuples."""


class OfHalves(LazyTensor):
    """The difference of an output's halves, a multiple of it, or guidance with that."""

    __slots__ = ("_general", "cond", "form", "scale", "uncond", "version")
    # set by those functions that make one: a call of __init__ takes as long as an operation of a pipeline

    uncond: Traced
    cond: Traced
    version: int
    """How often the output had been written to when the difference was taken."""
    form: int
    scale: float
    _general: Combined | None

    @property
    def dtype(self) -> torch.dtype:
        """The output's."""
        return self.uncond.source.dtype

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return self.uncond.ndim

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        return self.uncond.value()

    def is_whole(self) -> bool:
        """Tell whether it is guidance of the halves of a whole output, which nobody has written to since."""
        return self.form == GUIDED and self._general is None and self.uncond.source.tensor._version == self.version

    def combined(self) -> Combined:
        """Return the combination that it is, the same one each time."""
        if self._general is None:
            self._general = self._made()
        return self._general

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor, for any use, the same one each time; ``by``: the operation that asks."""
        return self.combined().computed(by)

    def _made(self) -> Combined:
        uncond, cond, form, scale = self.uncond, self.cond, self.form, self.scale
        of_uncond = 1.0 - scale if form == GUIDED else -scale
        terms: tuple[Term, ...] = ((uncond, of_uncond, 0.0), (cond, scale, 0.0))
        made_by = functools.partial(_computed, form, scale), uncond, cond
        return Combined(made_by, terms, None, self.dtype, ((uncond.source, self.version),))


_new = object.__new__


def _computed(form: int, scale: float, uncond: Tensor, cond: Tensor) -> Tensor:
    """Compute what a pipeline asked for, by its own operations."""
    made = cond - uncond
    if form != DIFFERENCE and scale != 1.0:
        made = scale * made
    return uncond + made if form == GUIDED else made


def difference(first: Any, second: Any) -> OfHalves | None:
    """Return ``first - second`` of an output's second and first half; ``None``: they are not those."""
    if type(first) is not Traced or type(second) is not Traced or first.piece is not SECOND:
        return None
    source = first.source
    if second.piece is not FIRST or second.source is not source or not source.is_linear:
        return None
    try:
        version = source.tensor._version
    except RuntimeError:  # an inference tensor, which counts nothing
        return None
    made = _new(OfHalves)
    made.uncond, made.cond, made.version, made.form, made.scale = second, first, version, DIFFERENCE, 1.0
    made._general = None
    return made


def scaled(scale: Any, of: Any) -> OfHalves | None:
    """Return a number times a difference; ``None``: they are not those."""
    if type(of) is not OfHalves or type(scale) is not float or of.form != DIFFERENCE or of._general is not None:
        return None
    if not -LARGEST < scale < LARGEST:
        return None
    made = _new(OfHalves)
    made.uncond, made.cond, made.version, made.form, made.scale = of.uncond, of.cond, of.version, SCALED, scale
    made._general = None
    return made


def guided(uncond: Any, of: Any) -> OfHalves | None:
    """Return the first half and a multiple of the difference; ``None``: they are not those."""
    if type(of) is not OfHalves or uncond is not of.uncond or of.form == GUIDED or of._general is not None:
        return None
    if uncond.source.tensor._version != of.version:
        return None
    made = _new(OfHalves)
    made.uncond, made.cond, made.version, made.form, made.scale = uncond, of.cond, of.version, GUIDED, of.scale
    made._general = None
    return made
