"""Turn the one scale of CFG++ into a scale of classifier-free guidance for each of a table's calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..schedules.levels import Levels


class FirstOrder(Protocol):
    """What CFG++ needs of a ``StepTable``."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def levels(self) -> Levels | None: ...  # noqa: D102
    @property
    def history_slots(self) -> int: ...  # noqa: D102

    def coefficients(self) -> Mapping[str, Tensor]: ...  # noqa: D102


def plus_plus_scales(table: FirstOrder, guidance_scale: float) -> Tensor:
    """Return the scales that make CFG++ of classifier-free guidance, shape (calls,).

    CFG++ takes x_0 from ``u + scale * (c - u)``, and noises it again with what u says the noise is (Chung et al. 2024,
    arXiv 2406.08070, algorithm 2): ``x' = alpha' * x_0 + sigma' * epsilon(u)``. Without a clip, x' is linear in both.
    A row's ``x' = S * x + C * m``, with ``x_0 = a * x + b * m``, is ``alpha' * x_0 + sigma' * epsilon`` if
    ``sigma' / sigma = S - a * C / b`` and ``alpha' = C / b + alpha * sigma' / sigma``. Of C, ``alpha' * b`` is x_0's
    part, which is to be scaled, so that ``scale * alpha' * b / C`` of all of it is the same.

    Raises:
        ValueError: the table clips, goes back to earlier calls, or does not know its levels.
    """
    row = table.coefficients()
    if bool((row["clip"] < torch.inf).any()):
        raise ValueError(f"table: expected one that does not clip, as CFG++ is no scale then, got {table.name}")
    if table.history_slots:
        raise ValueError(f"table: expected one of a first-order solver for CFG++, got {table.name}")
    if table.levels is None:
        raise ValueError(f"table: expected one that knows the levels of its calls, got {table.name}")
    a, b = row["x0_scale"] * row["x0_sample"], row["x0_scale"] * row["x0_pred"]
    sample, prediction = row["out_x0"] * a + row["out_sample"], row["out_x0"] * b + row["out_pred"]
    alpha = table.levels.alpha.to(b)
    scales = guidance_scale * (1 + alpha * (sample * b - a * prediction) / prediction)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"table: expected calls whose predictions say something of x_0, got {table.name}")
    return scales
