"""Tell whether a table of a scheduler's has been written to since it was read."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_of(table: Tensor) -> Any:
    """Return what is another once a table has been written to: how often it was, which torch counts.

    It does not for inference tensors, for which their bits stand; so does ``None`` for those on a device, that would
    have to be waited for.
    """
    if not table.is_inference():
        return table._version
    if not table.is_cpu:
        return None
    with outside_of_modes():
        return tuple(table.flatten().view(_OF_BYTES[table.element_size()]).tolist())


def outside_of_modes() -> contextlib.AbstractContextManager[None]:
    """Return a context for what later steps find again: in a ``FakeTensorMode``, too, its tensors are real ones."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()
