"""Runs the CUDA kernel of a step's backward pass on the host, called as the operator is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguide.step.backends.native import GRADIENT_TILE
from fastguide.step.backward import Gradients
from tests.support.device_code import Recorded, arguments_of, as_recorded, described, module

_TENSORS = [name for name in Gradients._fields if name not in ("grad_predictions", "grad_weights", "clipped")]


def gradients_of(b: Gradients, batch: int, predictions: int, sums: Tensor | None) -> dict:
    """Make plain data of the operator's other arguments, as csrc/binding/backward.cpp does."""
    each = list(b.grad_predictions)
    if len(each) == 1 < predictions:
        each = list(each[0].tensor_split(predictions))
    several = b.grad_left if b.grad_left is not None else b.grad_history
    found = {name: described(t) for name in _TENSORS if (t := getattr(b, name)) is not None}
    found |= {
        "grad_predictions": [described(t) for t in each],
        "slots": 0 if several is None else len(several) // batch,
    }
    return found if sums is None else found | {"grad_weights": sums.data_ptr()}


def sums_of(b: Gradients, size: int) -> Tensor | None:
    """Return memory for what the tiles of each sample add to the gradients of weights."""
    if b.grad_weights is None:
        return None
    batch, columns = b.grad_weights.shape
    return torch.full((batch, -(-size // GRADIENT_TILE), columns), torch.nan, dtype=torch.float64)


def guided_step_backward(*arguments: object, order: int = 1, **gradients: object) -> int:
    """Write the gradients of a step of CPU tensors; return the number of accesses of 16 bytes."""
    b, a = Gradients(**gradients), arguments_of(*arguments)
    if not a["batch"] * a["elements_per_sample"]:
        if b.grad_weights is not None:
            b.grad_weights.zero_()
        return 0
    sums = sums_of(b, a["elements_per_sample"])
    accesses = module().launch_backward(a, gradients_of(b, a["batch"], len(a["predictions"]), sums), order)
    if b.grad_weights is not None:
        torch.sum(sums, 1, out=b.grad_weights)
    return accesses


def record(sums: Tensor | None, *arguments: object, **gradients: object) -> Recorded:
    """Return the launch that the backward pass makes, and run nothing; ``sums`` is that of ``sums_of``."""
    b, a = Gradients(**gradients), arguments_of(*arguments)
    (launch,) = module().record_backward(a, gradients_of(b, a["batch"], len(a["predictions"]), sums))
    return as_recorded(launch)
