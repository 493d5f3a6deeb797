"""Say what a table's predictions are in another space: as epsilon, or as a velocity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..schedules.levels import Levels

SAMPLE, PREDICTION = "space_sample", "space_prediction"
"""The parameters of programs whose predictions are in such a space."""


class Table(Protocol):
    """What a space needs of a ``StepTable``."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def levels(self) -> Levels | None: ...  # noqa: D102

    def coefficients(self) -> Mapping[str, Tensor]: ...  # noqa: D102


class TableSpace(NamedTuple):
    """A space of a table's predictions p, in which each is ``sample * x + prediction * p``; from ``space_of``."""

    name: str
    sample: Tensor
    """float64, of shape (calls, 1), on the host."""
    prediction: Tensor

    def parameters(self) -> dict[str, Tensor]:
        """Return both, by the names that they have in programs."""
        return {SAMPLE: self.sample, PREDICTION: self.prediction}


def space_of(table: Table, name: Literal["epsilon", "velocity"]) -> TableSpace:
    """Return a space for guidance whose weights do not sum to one: what a table's predictions are as another type.

    ``guidance(..., space=space_of(table, "velocity"))`` takes norms and deviations of the velocities that the
    predictions say, whatever the model predicts, and has one scale a call, for loops over this table.

    Args:
        table: of the loop, whole; it has to know the levels of its calls, ``x = alpha x_0 + sigma epsilon``.
        name: ``"epsilon"``; or ``"velocity"``: ``epsilon - x_0`` where ``alpha + sigma = 1``, as in flow matching, and
            else ``(alpha epsilon - sigma x_0) / sqrt(alpha^2 + sigma^2)`` (Salimans & Ho 2022).

    Raises:
        ValueError: the table does not know its levels, or the predictions do not say it at some call: at
            ``alpha = 0``, where flow matching begins, x is epsilon, whatever is predicted.

    >>> from fastguide import ClassifierFree, NoiseSchedule, ddim
    >>> table = ddim(NoiseSchedule.linear(), 50)
    >>> ClassifierFree(7.5, guidance_rescale=0.7, space=space_of(table, "velocity")).steps
    50
    """
    if name not in ("epsilon", "velocity"):
        raise ValueError(f"name: expected 'epsilon' or 'velocity', got {name!r}")
    if table.levels is None:
        raise ValueError(f"table: expected one that knows the levels of its calls, got {table.name}")
    row = table.coefficients()
    alpha, sigma = (level.to("cpu", torch.float64) for level in table.levels)
    of_sample, of_prediction = row["x0_scale"] * row["x0_sample"], row["x0_scale"] * row["x0_pred"]
    if name == "epsilon":  # (x - alpha x_0) / sigma
        sample, original = 1 / sigma, -alpha / sigma
    elif bool(((alpha + sigma - 1).abs() < 1e-6).all()):  # (x - alpha x_0) / sigma - x_0
        sample, original = 1 / sigma, -(alpha + sigma) / sigma
    else:
        length = (alpha**2 + sigma**2).sqrt()
        sample, original = alpha / sigma / length, -length / sigma
    sample, prediction = sample + original * of_sample, original * of_prediction
    if not bool((sample.isfinite() & prediction.isfinite() & (prediction != 0)).all()):
        raise ValueError(f"table: expected calls whose predictions say an {name}, got {table.name}")
    return TableSpace(name, sample.view(-1, 1), prediction.view(-1, 1))
