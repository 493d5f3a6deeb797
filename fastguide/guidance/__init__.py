"""Guidance: each class sets the weights of the model's predictions, and subclasses ``Guidance`` of weights.py."""

from .adaptive_projected import AdaptiveProjected
from .auto import AutoGuidance
from .classifier import Classifier
from .classifier_free import ClassifierFree
from .composed import Composed
from .frequency_decoupled import FrequencyDecoupled
from .from_moments import as_guidance
from .magnitude_aware import MagnitudeAware
from .normalized import Normalized
from .perp_neg import PerpNeg
from .perturbed import Perturbed
from .spaces import space_of
from .tangential import Tangential
from .weights import Guidance
from .zero_star import ZeroStar

__all__ = [
    "AdaptiveProjected",
    "AutoGuidance",
    "Classifier",
    "ClassifierFree",
    "Composed",
    "FrequencyDecoupled",
    "Guidance",
    "MagnitudeAware",
    "Normalized",
    "PerpNeg",
    "Perturbed",
    "Tangential",
    "ZeroStar",
    "as_guidance",
    "space_of",
]
