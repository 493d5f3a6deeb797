"""What the calls of a loop add up for guidance with momentum: a tensor like the sample, which each step moves on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.moment_weights import MomentWeights
from ..guidance.momentum import AddedUp
from ..solvers.table import StepTable
from . import checks
from .cursor import Cursor
from .memory import empty_strided, same_layout
from .operator import StepArguments

_Made = TypeVar("_Made")
SHIFT = Guidance(torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64, device="cpu"), None)
"""The difference of two predictions."""


class Momentum:
    """The sum ``r = c - u + momentum * r_before`` of a loop's own, for guidance with ``momentum``.

    Make one for each loop, and give it to each of its steps; ``Sampler`` does both. It begins as zeros. Steps whose
    index is an int have to be in order, from any one on; those of a tensor or of a ``Cursor``, which only the
    device knows, are not checked.

    Args:
        table: of the loop.
        guidance: with momentum, such as ``AdaptiveProjected(7.5, momentum=-0.5)``, or its sum with a classifier.
        sample: the loop's sample, whose shape, layout and device r has. It is float32, or float64 if that is.

    Attributes:
        values: r over ``unit``, of the sample's shape. Where a sample of the batch begins a loop of its own, set it to
            0 there.
        unit: 2^20, as r may be many times as long as a prediction, and would round that off.

    >>> from fastguide import AdaptiveProjected, NoiseSchedule, ddim, guided_step
    >>> table, guidance, x = ddim(NoiseSchedule.linear(), 5), AdaptiveProjected(7.5, momentum=-0.5), torch.randn(2, 8)
    >>> momentum = Momentum(table, guidance, x)
    >>> for index in range(len(table)):
    ...     x = guided_step(table, index, x, [0.1 * x, 0.2 * x], guidance, momentum=momentum)
    >>> momentum
    Momentum((2, 8), torch.float32, cpu)
    """

    def __init__(self, table: StepTable, guidance: Guidance, sample: Tensor) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
        if not isinstance(sample, Tensor) or sample.dim() == 0:
            raise TypeError("sample: expected a tensor of shape (batch, ...)")
        self._table, self._key = table, _checked_key(guidance)
        assert isinstance(guidance.derived, AddedUp)
        self.unit = guidance.derived.unit
        self._of_terms = guidance, guidance.of_terms()
        with torch.inference_mode(False):  # or only inference mode could write it
            self._updates = updates_of(table, guidance).to(sample.device)
            self.values = sums_like(sample)
        self._next: int | None = None
        self._recorded = False
        """Whether autograd may have kept the values, which are then left as they are."""

    def restart(self) -> Momentum:
        """Begin a new loop: nothing has been added up. What autograd has recorded is left behind."""
        self._next = None
        if self._recorded or self.values.requires_grad:
            with torch.inference_mode(False):
                self.values, self._recorded = sums_like(self.values), False
        else:
            self.values.zero_()
        return self

    def to_be_written(self, terms: list[Tensor]) -> list[Tensor]:
        """Return a step's terms, of which the sums are first, with sums that ``add`` may write to."""
        if not self._recorded:
            return terms
        with torch.inference_mode(False):
            self.values, self._recorded = self.values.detach().clone(), False
        return [self.values, *terms[1:]]

    def continued(self, values: Tensor, index: int) -> Momentum:
        """Return one that goes on from these values with the call of this index, which may write to them."""
        other = copy(self)
        other.values, other._next = values, index
        return other

    def guidance_of_terms(self, guidance: Guidance) -> Guidance:
        """Return guidance of the terms, the same one each time for the same guidance."""
        if self._of_terms[0] is not guidance:
            self._of_terms = guidance, guidance.of_terms()
        return self._of_terms[1]

    def add(
        self,
        step: Callable[..., Tensor],
        index: int | Tensor | Cursor,
        predictions: Tensor | Sequence[Tensor],
        backend: str | None,
        _checked: StepArguments | None = None,
    ) -> None:
        """Add up the difference of two predictions; ``step``: ``guided_step``, whose arguments the others are.

        ``_checked``: the arguments of the step that is to come.
        """
        where = rows_at(index.state, index.batch is not None) if isinstance(index, Cursor) else index
        step(self._updates, where, self.values, predictions, SHIFT, out=self.values, backend=backend)
        self._next = index + 1 if isinstance(index, int) else None

    def add_recorded(
        self,
        step: Callable[..., Tensor],
        index: int | Tensor | Cursor,
        predictions: Tensor | Sequence[Tensor],
        backend: str | None,
        make: Callable[[Tensor], _Made],
    ) -> _Made:
        """Do as ``add``, to a new tensor, so that autograd can record it; return what ``make`` makes of that.

        Where either raises, nothing has been added up.
        """
        if isinstance(index, int):
            checks.check_row(self._table, index)
        where = rows_at(index.state, index.batch is not None) if isinstance(index, Cursor) else index
        values = step(self._updates, where, self.values, predictions, SHIFT, backend=backend)
        made = make(values)
        self.values, self._next = values, index + 1 if isinstance(index, int) else None
        self._recorded = True
        return made

    def check(self, table: StepTable, guidance: Guidance, index: int | Tensor | Cursor, sample: Tensor) -> None:
        """Refuse a step of another table, guidance, sample or call."""
        if table is not self._table:
            raise ValueError(f"momentum: expected one made for this {table!r}, got one for {self._table!r}")
        if guidance is not self._of_terms[0] and _checked_key(guidance) != self._key:
            raise ValueError(f"momentum: expected one made for guidance such as {guidance!r}, got one for another")
        values = self.values
        if values.shape != sample.shape or not same_layout(values, sample):
            raise ValueError(
                f"momentum: expected one for samples of shape {tuple(sample.shape)} and strides {sample.stride()}, got "
                f"shape {tuple(values.shape)} and strides {values.stride()}"
            )
        dtype = _dtype_for(sample)
        if values.dtype != dtype:
            raise TypeError(f"momentum: expected {dtype} for a sample of {sample.dtype}, got {values.dtype}")
        if values.device != sample.device:
            raise ValueError(f"momentum: expected it on {sample.device}, the sample's device, got {values.device}")
        if torch.compiler.is_compiling():  # the count, read there, would stay the first one
            return
        if type(index) is int and self._next is not None and index < self._next:
            raise ValueError(
                f"index: expected a call after the last one that this momentum has added up, {self._next} or a later "
                f"one, or restart() before another loop, got {index}"
            )

    def __repr__(self) -> str:
        return f"Momentum({tuple(self.values.shape)}, {self.values.dtype}, {self.values.device})"


def _dtype_for(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def sums_like(sample: Tensor) -> Tensor:
    """Return memory for r, zeros of the sample's shape and layout, in the precision of the arithmetic."""
    strides = (sample[:1].numel(), *sample.stride()[1:])
    return empty_strided(tuple(sample.shape), strides, _dtype_for(sample), sample.device).zero_()


def updates_of(table: StepTable, guidance: Guidance) -> StepTable:
    """Return the rows by which r is moved on, one more than the table has: finished samples are at the last one."""
    rule, made_by = guidance.derived, guidance.weights_from
    assert isinstance(rule, AddedUp)
    active = made_by.active if isinstance(made_by, MomentWeights) else None
    of_sum, of_shift = rule.coefficients(table.coefficients(), active)
    columns = {
        "out_sample": torch.cat([of_sum, torch.ones_like(of_sum[:1])]),
        "out_pred": torch.cat([of_shift, torch.zeros_like(of_sum[:1])]),
    }
    timesteps = torch.zeros(len(table) + 1, dtype=torch.int64, device="cpu")
    return StepTable.from_columns(timesteps, columns, name="the sum of the predictions' differences")


def updates_key(guidance: Guidance) -> Hashable:
    """Return what the rows of ``updates_of`` depend on beside the table."""
    rule, made_by = guidance.derived, guidance.weights_from
    if not isinstance(rule, AddedUp):
        return None
    active = made_by.active if isinstance(made_by, MomentWeights) else None
    space = rule.space if isinstance(rule.space, str) else tuple(rule.space.prediction.flatten().tolist())
    return rule.momentum, rule.has_uncond, space, None if active is None else tuple(active.tolist())


def rows_at(cursor: Tensor, per_sample: bool) -> Tensor:
    """Return the row of each sample, or the one of all, as a view of a cursor's state."""
    return cursor[:, 0] if per_sample else cursor[0, 0]


def momentum_terms(
    momentum: Momentum, table: StepTable, index: Any, sample: Any, predictions: Any, guidance: Any
) -> tuple[Guidance, list[Tensor]]:
    """Check a step with momentum; return its guidance of terms, and the terms."""
    if not isinstance(momentum, Momentum):
        raise TypeError(f"momentum: expected a Momentum, got {type(momentum).__name__}")
    if not isinstance(guidance, Guidance) or not isinstance(guidance.derived, AddedUp):
        raise ValueError(f"momentum: expected None, as no momentum is in the guidance {guidance!r}, got {momentum!r}")
    if not isinstance(table, StepTable):
        raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
    checks.device_of("sample", sample)
    momentum.check(table, guidance, index, sample)
    given = checks.as_list(predictions)
    terms = guidance.derived.terms(momentum.values, given)
    stacked = (len(sample) * 2, *sample.shape[1:]) if len(given) == 1 else None
    for k, prediction in enumerate(given):
        checks.check_operand("predictions" if stacked else f"predictions[{k}]", prediction, sample, False, stacked)
    return momentum.guidance_of_terms(guidance), terms


def _checked_key(guidance: Any) -> Hashable:
    key = updates_key(guidance) if isinstance(guidance, Guidance) else None
    if key is None:
        raise ValueError(
            f"guidance: expected one with momentum, such as AdaptiveProjected(7.5, momentum=-0.5), got {guidance!r}"
        )
    return key
