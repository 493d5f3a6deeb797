"""The order of a solver: how its error falls with the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def slope(error: Callable[[int], float], steps: Sequence[int]) -> float:
    """The slope of the error against the step size, in logarithms, by least squares."""
    errors = [error(count) for count in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]
