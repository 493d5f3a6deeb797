"""Solvers: each is a function that returns a step table, one file a family, the formula with its paper."""

from .cogvideox_ddim import cogvideox_ddim
from .consistency import consistency
from .ddim import ddim
from .ddpm import VarianceType, ddpm
from .edm_euler import edm_euler
from .euler import euler
from .euler_ancestral import euler_ancestral
from .flow_match_euler import flow_match_euler
from .lcm import lcm
from .table import ROW_COLUMNS, StepTable
from .tcd import tcd

__all__ = [
    "ROW_COLUMNS",
    "StepTable",
    "VarianceType",
    "cogvideox_ddim",
    "consistency",
    "ddim",
    "ddpm",
    "edm_euler",
    "euler",
    "euler_ancestral",
    "flow_match_euler",
    "lcm",
    "tcd",
]
