"""Refuse tensors in which others than autograd see more than values: forward-mode derivatives, and torch.func."""

from __future__ import annotations

import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch


def check_that_they_are_plain(tensors: list[Tensor], whose: str) -> None:
    """Refuse tensors that are differentiated, or mapped over, in other ways than autograd's.

    ``whose``: the call that they are given to.
    """
    if _functorch.peek_interpreter_stack() is not None:
        for tensor in tensors:
            if _functorch.is_batchedtensor(tensor) or _functorch.is_gradtrackingtensor(tensor):
                raise NotImplementedError(
                    f"{whose}: expected no tensors of torch.func, whose transforms it lacks; torch.autograd.grad() and "
                    "backward() have its gradients"
                )
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(f"{whose}: expected no tangents, as it has no forward-mode derivative")
