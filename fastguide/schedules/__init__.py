"""How much signal is left at each timestep, and what a model may predict of it."""

from .noise_schedule import NoiseSchedule, TimestepSpacing
from .predictions import GradientForm, PredictionType

__all__ = ["GradientForm", "NoiseSchedule", "PredictionType", "TimestepSpacing"]
