"""Say what guidance with momentum adds up over a loop's steps, and what it is a sum of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .spaces import TableSpace
from .symbols import UNIT_OF_STATE, Space


class AddedUp(NamedTuple):
    """The sum ``r = d + momentum * r_before`` of differences ``d = c - u``, which such guidance has for its first term.

    It is the first because kernels anchor a sum at its first term, and r is small where u and c nearly agree: what r
    and the differences to it round off is of their own size. So that it is small in any case, the term is r over
    ``unit``. The others are c, and u where that has a weight.
    """

    momentum: float
    has_uncond: bool
    """Whether u is a term."""
    space: Space | TableSpace = "prediction"
    """What u and c are taken as in d."""

    @property
    def number(self) -> int:
        """How many terms there are beyond the two predictions."""
        return int(self.has_uncond)

    @property
    def kind(self) -> AddedUp:
        """What a loop's buffers depend on; the numbers are in them."""
        return AddedUp(0.0, self.has_uncond)

    @property
    def unit(self) -> float:
        """What r is kept as a multiple of."""
        return UNIT_OF_STATE

    def terms(self, sums: Tensor, predictions: Sequence[Tensor]) -> list[Tensor]:
        """Return the terms.

        Args:
            sums: r over ``unit``, of shape (batch, ...).
            predictions: unconditional, conditional; or one tensor of both along the batch.

        Raises:
            ValueError: there are not two.
        """
        if len(predictions) == 1 and isinstance(predictions[0], Tensor) and predictions[0].dim() > 0:
            predictions = predictions[0].chunk(2)
        if len(predictions) != 2:
            raise ValueError(f"predictions: expected two, unconditional and conditional, got {len(predictions)}")
        uncond, cond = predictions
        return [sums, cond, uncond] if self.has_uncond else [sums, cond]

    def coefficients(self, row: Mapping[str, Tensor], active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what r and the difference of the model's predictions are multiplied by at each call, for the next r.

        Both r are over ``unit``.

        Args:
            row: a table's columns, each of shape (calls,), float64 on the host.
            active: which calls are guided; at the others r stays as it is. ``None``: all.
        """
        of_shift = row["x0_scale"] * row["x0_pred"] if self.space == "original" else torch.ones_like(row["x0_pred"])
        if isinstance(self.space, TableSpace):
            of_shift = self.space.prediction[:, 0].expand_as(of_shift)
        # Where a call's prediction says nothing of x_0, guidance has no weights either.
        of_shift = torch.where(of_shift.isfinite(), of_shift / self.unit, 0.0)
        of_sum = torch.full_like(of_shift, self.momentum)
        if active is not None:
            of_sum, of_shift = torch.where(active, of_sum, 1.0), torch.where(active, of_shift, 0.0)
        return of_sum, of_shift


def check_momentum_number(momentum: Any) -> None:
    """Refuse what is no momentum: what is added up has to fade."""
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: expected a number or None, got {type(momentum).__name__}")
    if not -1.0 < momentum < 1.0:
        raise ValueError(
            "momentum: expected a number above -1 and below 1, so that what earlier steps have added up fades, got "
            f"{momentum}"
        )


def check_without_momentum(guidance: Any) -> None:
    """Refuse guidance with momentum, in a step that was given none."""
    if isinstance(getattr(guidance, "derived", None), AddedUp):
        raise ValueError(
            "momentum: expected a Momentum(table, guidance, sample) of the loop's own, as this guidance adds up what "
            "its steps predict, got None"
        )
