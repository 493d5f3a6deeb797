"""Refuse second derivatives in words, where what a first one was computed of could change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batched_gradients import OlderBatch


def refusing_second(gradients: Sequence[Tensor | None], of: Sequence[object], whose: str) -> tuple[Tensor | None, ...]:
    """Return gradients that a backward pass has computed without recording how; one through them raises an error.

    Without ``create_graph=True``, or where nothing of what they depend on requires a gradient, they are returned as
    they are. torch's ``once_differentiable`` looks at the gradients that come in alone.

    Args:
        gradients: what the backward pass returns.
        of: what they depend on, of which some may be no tensor.
        whose: the call that was recorded.
    """
    batch = OlderBatch.among(gradients) if torch.is_grad_enabled() else None
    if batch is not None:  # to which autograd's own functions are constants
        return tuple(batch.joined(refusing_second(batch.apart(gradients), batch.apart(of), whose)))
    changeable = [tensor for tensor in of if isinstance(tensor, Tensor) and tensor.requires_grad]
    if not torch.is_grad_enabled() or not changeable:
        return tuple(gradients)
    message = (
        f"{whose}: expected first derivatives alone, as its backward pass is not recorded; for second ones, make the "
        "step of torch's own operations, with the factors of table.coefficients()"
    )
    places = [k for k, gradient in enumerate(gradients) if gradient is not None]
    computed = [gradients[k] for k in places]
    refused = _Refused.apply(message, len(places), *computed, *changeable)  # type: ignore[no-untyped-call]
    found = dict(zip(places, refused, strict=True))
    return tuple(found.get(k) for k in range(len(gradients)))


class _Refused(torch.autograd.Function):
    """The first few tensors, as if they were computed of the others: autograd comes by here on its way to those."""

    generate_vmap_rule = True  # for batches of gradients

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([tensor.detach() for tensor in tensors[:count]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)
