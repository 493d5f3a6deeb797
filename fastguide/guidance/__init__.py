"""Guidance: each class sets the weights of the model's predictions, and subclasses ``Guidance`` of weights.py."""

from .classifier import Classifier
from .classifier_free import ClassifierFree
from .composed import Composed
from .weights import Guidance

__all__ = ["Classifier", "ClassifierFree", "Composed", "Guidance"]
