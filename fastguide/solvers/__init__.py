"""Solvers: each is a function that returns a step table, one file a family, the formula with its paper.

``__all__`` is the list of them: ``fastguide`` has its names.
"""

from .cogvideox_ddim import cogvideox_ddim
from .cogvideox_dpm import cogvideox_dpm
from .consistency import consistency
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm2 import dpm2
from .dpm_solver import dpm_solver
from .dpm_solver_singlestep import dpm_solver_singlestep
from .edm_dpm_solver import edm_dpm_solver
from .edm_euler import edm_euler
from .entries import Entry as Entry
from .entries import Form as Form
from .entries import history_columns as history_columns
from .euler import euler
from .euler_ancestral import euler_ancestral
from .flow_match_euler import flow_match_euler
from .flow_match_heun import flow_match_heun
from .flow_match_sde import flow_match_sde
from .heun import heun
from .lcm import lcm
from .lms import lms
from .pndm import pndm
from .sa_solver import sa_solver
from .table import ROW_COLUMNS, StepTable
from .tcd import tcd
from .unipc import unipc

__all__ = [
    "ROW_COLUMNS",
    "StepTable",
    "cogvideox_ddim",
    "cogvideox_dpm",
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm_solver",
    "dpm_solver_singlestep",
    "edm_dpm_solver",
    "edm_euler",
    "euler",
    "euler_ancestral",
    "flow_match_euler",
    "flow_match_heun",
    "flow_match_sde",
    "heun",
    "lcm",
    "lms",
    "pndm",
    "sa_solver",
    "tcd",
    "unipc",
]
