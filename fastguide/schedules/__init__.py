"""How much signal is left at each timestep, and what a model may predict of it."""

from .levels import Levels
from .noise_schedule import NoiseSchedule, TimestepSpacing
from .predictions import GradientForm, PredictionType

__all__ = ["GradientForm", "Levels", "NoiseSchedule", "PredictionType", "TimestepSpacing"]
