"""Give the library the objects of Python and of torch that it needs, and have its functions for Python."""

from __future__ import annotations

import _thread
import sys

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .backends import native
from .backends.registry import BACKENDS
from .call import Objects
from .inpainting import Inpainting
from .memory import empty_like
from .threads import WAITS

_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._is_tracing,
    torch._C._functorch.peek_interpreter_stack,
)
"""Tell whether modes, the profiler, the tracer or transforms are to see the operator. torch.compile is apart."""


def _attached() -> native.PythonFunctions | None:
    """Give the library the objects that it needs; return its functions."""
    found = native.python_functions() if BACKENDS["native"].devices else None
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if found is None or exchange is None:
        return None
    objects = Objects(
        none=None,
        true_object=True,
        integer_type=int,
        tensor_type=Tensor,
        generator_type=torch.Generator,
        sequence_types=(list, tuple),
        inpainting_type=Inpainting,
        cpu=torch.device("cpu"),
        requires_grad="requires_grad",
        dtype="dtype",
        version="_version",
        last_weights="last_weights",
        storage_offset=Tensor.storage_offset,
        device="device",
        is_grad_enabled=torch.is_grad_enabled,
        watchers=_WATCHERS,
        forward_ad=vars(forward_ad),
        current_level="_current_level",
        empty_like=torch.empty_like,
        new_like=empty_like,
        normal_=Tensor.normal_,
        generator="generator",
        get_state=torch.Generator.get_state,
        set_state=torch.Generator.set_state,
        count_threads=_thread._count,
        own_thread=_thread.get_ident,
        frames=sys._current_frames,
        locals="f_locals",
        waits=WAITS,
        exchange=exchange,
    )
    return None if found.attach(*objects) is None else found


functions = _attached()
"""The library's; ``None``: there is no library, or this torch's exchange of tensors is another."""


def is_watched() -> bool:
    """Tell whether something but torch.compile is to see the operator itself, or there is no library."""
    return functions is None or functions.is_watched() is True
