"""Guided diffusion sampling in one fused kernel: guidance is weights, a solver is a table of rows."""

from . import _require_torch as _require_torch  # isort: skip
from ._version import __version__ as __version__
from .guidance import Classifier, ClassifierFree, Composed, Guidance
from .sampling.sampler import Sampler
from .sampling.trajectory import Trajectory
from .schedules import FlowSchedule, NoiseSchedule, linear_quadratic_sigmas
from .solvers import (
    ROW_COLUMNS,
    StepTable,
    cogvideox_ddim,
    cogvideox_dpm,
    consistency,
    ddim,
    ddpm,
    deis,
    dpm2,
    dpm_solver,
    dpm_solver_singlestep,
    edm_dpm_solver,
    edm_euler,
    euler,
    euler_ancestral,
    flow_match_euler,
    flow_match_heun,
    heun,
    lcm,
    lms,
    pndm,
    sa_solver,
    tcd,
    unipc,
)
from .step.cursor import Cursor
from .step.guided_step import guided_step
from .step.history import History
from .step.inpainting import Inpainting
from .step.noise import DeviceGenerator, portable_noise
from .training import (
    ConditionDropout,
    add_noise,
    classifier_loss,
    convert_prediction,
    denoising_loss,
    drop_condition,
    training_target,
)

__all__ = [
    "ROW_COLUMNS",
    "Classifier",
    "ClassifierFree",
    "Composed",
    "ConditionDropout",
    "Cursor",
    "DeviceGenerator",
    "FlowSchedule",
    "Guidance",
    "History",
    "Inpainting",
    "NoiseSchedule",
    "Sampler",
    "StepTable",
    "Trajectory",
    "add_noise",
    "classifier_loss",
    "cogvideox_ddim",
    "cogvideox_dpm",
    "consistency",
    "convert_prediction",
    "ddim",
    "ddpm",
    "deis",
    "denoising_loss",
    "dpm2",
    "dpm_solver",
    "dpm_solver_singlestep",
    "drop_condition",
    "edm_dpm_solver",
    "edm_euler",
    "euler",
    "euler_ancestral",
    "flow_match_euler",
    "flow_match_heun",
    "guided_step",
    "heun",
    "lcm",
    "linear_quadratic_sigmas",
    "lms",
    "pndm",
    "portable_noise",
    "sa_solver",
    "tcd",
    "training_target",
    "unipc",
]
