"""Copy a call's arguments, and compare what two calls returned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

_LEVELS = 255
"""The steps between black and white of an image of bytes, of which one is rounding."""


def copied(value: Any) -> Any:
    """Return a value with its own tensors, arrays and generators, those within lists and dictionaries too.

    torch's default generator stays itself: a model in training draws from it as well, for its dropout.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value if value is torch.default_generator else value.clone_state()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Image.Image):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    if type(value) is dict:
        return {name: copied(each) for name, each in value.items()}
    return value


def difference(one: Any, other: Any) -> float:
    """Return the largest difference of two outputs, over the largest value of the tensor or array that it is in.

    Images of bytes may differ by one level, and NaN is equal to NaN. What has no numbers is not looked at; infinite
    if the outputs have not as many tensors, arrays and images, or not of the same shapes.
    """
    ones, others = list(_arrays(one)), list(_arrays(other))
    if [each.shape for each in ones] != [each.shape for each in others]:
        return math.inf
    return max((_difference(*pair) for pair in zip(ones, others, strict=True)), default=0.0)


def varies(output: Any) -> bool:
    """Tell whether an output has more than two finite numbers, as that of a decoder at its limits says nothing."""
    return any(np.unique(each[np.isfinite(each)]).size > 2 for each in _arrays(output))


def _difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    if one.size == 0:
        return 0.0
    if one.dtype == np.uint8:
        apart = np.abs(one.astype(int) - other.astype(int)).max()
        return float(max(apart - 1, 0)) / _LEVELS
    one, other = (each.astype(complex if np.iscomplexobj(each) else float) for each in (one, other))
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if same.all():
        return 0.0
    found = float(np.abs(one - other)[~same].max())
    largest = float(np.abs(one[np.isfinite(one)]).max(initial=0.0))
    return math.inf if math.isnan(found) or largest == 0 else found / largest


def _arrays(output: Any) -> Iterator[np.ndarray[Any, Any]]:
    if isinstance(output, torch.Tensor):
        kept = output.detach()
        yield (kept.float() if kept.dtype in (torch.bfloat16, torch.float16) else kept).cpu().numpy()
    elif isinstance(output, (np.ndarray, Image.Image)):
        yield np.asarray(output)
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _arrays(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _arrays(each)
