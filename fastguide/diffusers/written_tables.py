"""Tell whether a table of a scheduler's has been written to since it was read."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def state_of(table: Tensor) -> Any:
    """Return what is another once a table has been written to: how often it was, which torch counts.

    It does not for inference tensors, for which their bytes stand. Those of a device would have to be waited for: for
    such a table it is ``None``, before it has been written to and after, and only another tensor in its place is seen.
    """
    try:
        return table._version
    except RuntimeError:  # an inference tensor
        return _bytes_of(table)


def _bytes_of(table: Tensor) -> bytes | None:
    if not table.is_cpu:
        return None
    with outside_of_modes():
        dense = table.contiguous()
        return ctypes.string_at(dense.data_ptr(), dense.nbytes)


def outside_of_modes() -> contextlib.AbstractContextManager[None]:
    """Return a context for what later steps find again: in a ``FakeTensorMode``, too, its tensors are real ones."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()
