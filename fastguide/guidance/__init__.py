"""Guidance: each is a class that returns the weights of the predictions."""

from .weights import Classifier, ClassifierFree, Composed, Guidance

__all__ = ["Classifier", "ClassifierFree", "Composed", "Guidance"]
