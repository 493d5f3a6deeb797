"""Launch the Triton kernel of a step's backward pass."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..backward import Gradients
from ..operator import StepArguments
from ..weigh import split
from .triton import OPTIONS, VECTOR, WARPS

BLOCK = VECTOR * WARPS * 32


def guided_step_backward(*arguments: Any, **gradients: Any) -> None:
    """Write the gradients of a step's inputs; the arguments are those of the operator of this name."""
    a, b = StepArguments(*arguments), Gradients(**gradients)
    if a.sample.numel() == 0:
        if b.grad_weights is not None:
            b.grad_weights.zero_()
        return
    from .triton_backward_kernel import backward_kernel

    batch, count = len(a.sample), a.weights.shape[-1] - 1 if a.predictions else 0
    size = a.sample.numel() // batch
    tiles = -(-size // BLOCK)
    each = tuple(split(a.predictions, max(count, 1), batch)) if a.predictions else ()
    to_each = tuple(split(list(b.grad_predictions), max(count, 1), batch)) if b.grad_predictions else None
    sums = None
    if b.grad_weights is not None:
        sums = torch.empty(batch, tiles, a.weights.shape[-1], dtype=torch.float32, device=a.sample.device)
    came = (b.grad_out, b.grad_original, b.grad_left)
    read = (a.sample, each, a.gradient, a.variance, a.noise, a.mask)
    inputs = (a.sample, each, a.rows, a.weights, a.indices, a.gradient, a.variance, a.noise, a.mask)
    outputs = (
        b.grad_sample, to_each, b.grad_gradient, b.grad_variance, b.grad_noise, b.grad_anchor, b.grad_history,
    )  # fmt: skip
    several = b.grad_left if b.grad_left is not None else b.grad_history
    clips = a.sample is not a.out  # which stands for it where nothing is clipped
    on_its_device = torch.cuda.device(a.sample.device) if a.sample.device.type == "cuda" else contextlib.nullcontext()
    with on_its_device:
        backward_kernel[(batch * tiles, 1, 1)](
            came, inputs, outputs, sums, *(tuple(map(_stride, group)) for group in (came, read, outputs)), size,
            _stride_unless_one(a.weights, 0), _stride_unless_one(a.weights, 1),
            a.indices.stride(0) if a.indices is not None and a.indices.dim() else 0,
            a.index, a.rows.shape[0], 0 if several is None else len(several) // batch, batch,
            count, clips, size % BLOCK == 0, BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    if b.grad_weights is not None and sums is not None:
        b.grad_weights.copy_(sums.double().sum(1))


def _stride(tensor: Any) -> Any:
    if tensor is None:
        return 0
    return tensor.stride(0) if isinstance(tensor, Tensor) else tuple(part.stride(0) for part in tensor)


def _stride_unless_one(tensor: Tensor, dimension: int) -> int:
    return tensor.stride(dimension) if tensor.shape[dimension] > 1 else 0
