"""Give a scheduler's steps the dynamic thresholding that its configuration asks for."""

from __future__ import annotations

from typing import Any

from ..solvers import StepTable


def why_not_thresholded(config: Any) -> str | None:
    """Return why rows cannot express a configuration's thresholding; ``None``: they can, or it asks for none."""
    if not config.get("thresholding"):
        return None
    ratio, most = config["dynamic_thresholding_ratio"], config["sample_max_value"]
    known = all(isinstance(value, (int, float)) for value in (ratio, most)) and 0 < ratio <= 1 <= most
    return None if known else "dynamic thresholding by numbers out of their range"


def thresholded(table: StepTable, config: Any) -> StepTable:
    """Return the table as a configuration asks for it: one that thresholds does not clip."""
    if not config.get("thresholding"):
        return table
    return table.with_dynamic_thresholding(config["dynamic_thresholding_ratio"], config["sample_max_value"])
