"""Guided diffusion sampling in one fused kernel: guidance is weights, a solver is a table of rows."""

from . import _require_torch as _require_torch  # isort: skip
from . import solvers as solvers
from ._version import __version__ as __version__
from .guidance import (
    AdaptiveProjected,
    AutoGuidance,
    Classifier,
    ClassifierFree,
    Composed,
    FrequencyDecoupled,
    Guidance,
    MagnitudeAware,
    Normalized,
    PerpNeg,
    Perturbed,
    Tangential,
    ZeroStar,
    as_guidance,
    space_of,
)
from .sampling.distributed.ranks import samples_of_rank
from .sampling.sampler import Sampler
from .sampling.trajectory import PolicyTrajectory, Trajectory
from .schedules import FlowSchedule, NoiseSchedule, linear_quadratic_sigmas
from .solvers import *  # noqa: F403  # every solver, and the table
from .step.cursor import Cursor
from .step.guided_step import guided_step
from .step.history import History
from .step.inpainting import Inpainting
from .step.log_probability import log_prob_of
from .step.momentum import Momentum
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
    *solvers.__all__,
    "AdaptiveProjected",
    "AutoGuidance",
    "Classifier",
    "ClassifierFree",
    "Composed",
    "ConditionDropout",
    "Cursor",
    "DeviceGenerator",
    "FlowSchedule",
    "FrequencyDecoupled",
    "Guidance",
    "History",
    "Inpainting",
    "MagnitudeAware",
    "Momentum",
    "Normalized",
    "NoiseSchedule",
    "PerpNeg",
    "Perturbed",
    "PolicyTrajectory",
    "Sampler",
    "Tangential",
    "Trajectory",
    "ZeroStar",
    "add_noise",
    "as_guidance",
    "classifier_loss",
    "convert_prediction",
    "denoising_loss",
    "drop_condition",
    "guided_step",
    "linear_quadratic_sigmas",
    "log_prob_of",
    "portable_noise",
    "samples_of_rank",
    "space_of",
    "training_target",
]
