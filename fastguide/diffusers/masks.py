"""Keep what a step takes of a mask, for as long as the mask is there and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .timesteps import version_of

_KEPT: Any = WeakTensorKeyDictionary()
"""What was made of masks last, and of what: a version, a layout and a function."""


def made_of(mask: Tensor, sample: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a function makes of a mask, in the sample's shape and layout, and in float32 or float64.

    Args:
        mask: of any dtype.
        sample: the step's.
        make: takes the mask in the result's dtype, and returns what broadcasts to the sample; a function of a module.
    """
    version = None if torch.compiler.is_compiling() else version_of(mask)
    key = (version, sample.shape, sample.stride()[1:], make)
    found = None if version is None else _KEPT.get(mask)
    if found is not None and found[0] == key:
        kept: Tensor = found[1]
        return kept
    dtype = torch.promote_types(mask.dtype, torch.float32)
    made = torch.empty_like(sample, dtype=dtype).copy_(make(mask.to(dtype)))
    if version is not None:  # an inference tensor's writes are not counted
        _KEPT[mask] = key, made
    return made
