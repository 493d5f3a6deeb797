"""What guidance asks of training: noised samples, losses, dropped conditions."""

from .condition_dropout import ConditionDropout, drop_condition
from .forward_process import add_noise, convert_prediction, training_target
from .losses import classifier_loss, denoising_loss

__all__ = [
    "ConditionDropout",
    "add_noise",
    "classifier_loss",
    "convert_prediction",
    "denoising_loss",
    "drop_condition",
    "training_target",
]
