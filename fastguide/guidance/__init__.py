"""Guidance: each is a class that returns the weights of the predictions."""

from .classifier import Classifier
from .classifier_free import ClassifierFree
from .composed import Composed
from .weights import Guidance

__all__ = ["Classifier", "ClassifierFree", "Composed", "Guidance"]
