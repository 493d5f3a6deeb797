"""Solvers: each is a function that returns a step table, one file a family, the formula with its paper."""

from .ddim import ddim
from .ddpm import VarianceType, ddpm
from .table import ROW_COLUMNS, StepTable

__all__ = ["ROW_COLUMNS", "StepTable", "VarianceType", "ddim", "ddpm"]
