"""The data: scikit-learn's 1,797 handwritten digits of 8 by 8 pixels, and a classifier that judges samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

NUM_CLASSES = 10
SHAPE = (1, 8, 8)
_HELD_OUT = 397
_NEIGHBOURS = 5


class Digits(NamedTuple):
    """Images in [-1, 1], float32 of shape (n, 1, 8, 8), and int64 labels of shape (n,)."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Return the digits for training and those held out; the split is always the same."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8.0 - 1.0
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return Digits(images[_HELD_OUT:], labels[_HELD_OUT:]), Digits(images[:_HELD_OUT], labels[:_HELD_OUT])


class Judge:
    """A support vector machine trained on clean digits; no model that takes part in sampling uses it."""

    def __init__(self, train: Digits, held_out: Digits) -> None:
        self._machine = SVC(gamma=0.02, C=10.0).fit(_flat(train.images), train.labels.numpy())
        self.accuracy = self.agreement(held_out.images, held_out.labels)

    def agreement(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of the images that the judge gives the label that was asked for."""
        return float((self._machine.predict(_flat(images)) == labels.numpy()).mean())


def coverage(images: Tensor, real: Digits) -> float:
    """Return the coverage of real digits by the images, 0 to 1 (Naeem et al. 2020, eq. 10).

    It is the share of real digits to which some image is nearer than their fifth nearest real neighbour. A distance
    between the images themselves would count noise and high contrast as variety.
    """
    flat = real.images.flatten(1)
    radius = torch.cdist(flat, flat).kthvalue(_NEIGHBOURS + 1, dim=1).values
    nearest = torch.cdist(flat, images.flatten(1)).amin(1)
    return (nearest < radius).double().mean().item()


def first_of_each_class(digits: Digits, count: int) -> Digits:
    """Return at most ``count`` digits of each class, in the order of the classes."""
    places = torch.cat([(digits.labels == label).nonzero()[:count, 0] for label in range(NUM_CLASSES)])
    return Digits(digits.images[places], digits.labels[places])


def nearest_classes(train: Digits) -> Tensor:
    """Return for each class the class with the nearest mean image, shape (10,): its negative condition."""
    means = torch.stack([train.images[train.labels == c].mean(0).flatten() for c in range(NUM_CLASSES)])
    distances = torch.cdist(means, means) + torch.eye(NUM_CLASSES) * 1e9
    return distances.argmin(1)


def _flat(images: Tensor) -> np.ndarray:
    flat: np.ndarray = images.flatten(1).clamp(-1, 1).numpy()
    return flat
