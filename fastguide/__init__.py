"""Guided diffusion sampling in one fused kernel: guidance is weights, a solver is a table of rows."""

from . import _floor as _floor  # isort: skip
from . import backends as backends
from ._version import __version__ as __version__
from .cursor import Cursor
from .forward import add_noise, convert_prediction, training_target
from .guidance import Classifier, ClassifierFree, Composed, Guidance
from .known import Known
from .noise import DeviceGenerator, portable_noise
from .ops import guided_step
from .records import Sampled
from .sampler import Sampler
from .schedule import NoiseSchedule
from .solvers import ddim, ddpm
from .table import ROW_COLUMNS, StepTable
from .training import ConditionDropout, classifier_loss, denoising_loss, drop_condition

__all__ = [
    "ROW_COLUMNS",
    "Classifier",
    "ClassifierFree",
    "Composed",
    "ConditionDropout",
    "Cursor",
    "DeviceGenerator",
    "Guidance",
    "Known",
    "NoiseSchedule",
    "Sampled",
    "Sampler",
    "StepTable",
    "add_noise",
    "classifier_loss",
    "convert_prediction",
    "ddim",
    "ddpm",
    "denoising_loss",
    "drop_condition",
    "guided_step",
    "portable_noise",
    "training_target",
]
