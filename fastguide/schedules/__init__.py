"""How much signal is left at each timestep, and what a model may predict of it."""

from .flow import FlowSchedule, FlowSteps, TimeShiftType
from .levels import Levels
from .noise_schedule import NoiseSchedule, TimestepSpacing
from .predictions import GradientForm, PredictionType
from .sigmas import SigmaSpacing, linear_quadratic_sigmas, spaced_sigmas

__all__ = [
    "FlowSchedule",
    "FlowSteps",
    "GradientForm",
    "Levels",
    "NoiseSchedule",
    "PredictionType",
    "SigmaSpacing",
    "TimeShiftType",
    "TimestepSpacing",
    "linear_quadratic_sigmas",
    "spaced_sigmas",
]
