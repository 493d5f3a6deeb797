"""Solvers: each is a function that returns a step table, one file a family, the formula with its paper."""

from .ddim import ddim
from .ddpm import VarianceType, ddpm
from .flow_match_euler import flow_match_euler
from .table import ROW_COLUMNS, StepTable

__all__ = [
    "ROW_COLUMNS",
    "StepTable",
    "VarianceType",
    "ddim",
    "ddpm",
    "flow_match_euler",
]
