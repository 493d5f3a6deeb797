"""Tell which of a table's calls are within an interval: of the loop, or of noise levels."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ..schedules.levels import Levels


class Calls(Protocol):
    """What an interval needs of a ``StepTable``."""

    @property
    def levels(self) -> Levels | None: ...  # noqa: D102

    def __len__(self) -> int: ...


def calls_within(table: Calls, start: float, stop: float, sigma: tuple[float, float] | None) -> Tensor:
    """Return a bool for each call, as ``Guidance.within`` describes it, on the host."""
    for name, value in (("start", start), ("stop", stop)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a fraction, 0 to 1, got {value!r}")
    if start > stop:
        raise ValueError(f"stop: expected at least start, {start}, got {stop}")
    calls = torch.arange(len(table), device="cpu")
    active = (calls >= int(start * len(table))) & (calls < int(stop * len(table)))
    if sigma is None:
        return active
    low, high = sigma
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ValueError(f"sigma: expected a low and a high level, got {sigma!r}")
    if table.levels is None:
        raise ValueError("sigma: expected a table that knows the levels of its calls; use start and stop")
    alpha, deviation = (level.to("cpu", torch.float64) for level in table.levels)
    ratio = deviation / alpha
    return active & (ratio > low) & (ratio <= high)
