"""Solvers: each is a function that returns a step table, one file a family."""

from ._columns import VarianceType, ddim, ddpm
from .table import ROW_COLUMNS, StepTable

__all__ = ["ROW_COLUMNS", "StepTable", "VarianceType", "ddim", "ddpm"]
