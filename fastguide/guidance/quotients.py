"""Square roots and quotients of tensors whose gradient is 0 where none comes in, also where torch's is 0 * inf.

A formula that divides by a norm takes another branch where that is 0: nothing comes back to the branch not taken, but
the derivatives there are infinite, and their product is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sqrt(radicand: Tensor) -> Tensor:
    """Return the square root; at 0 its gradient is 0, as a norm's is."""
    if not (torch.is_grad_enabled() and radicand.requires_grad):
        return torch.sqrt(radicand)
    root: Tensor = _Sqrt.apply(radicand)  # type: ignore[no-untyped-call]
    return root


def quotient(dividend: Tensor | float, divisor: Tensor | float) -> Tensor | float:
    """Return one over the other, which broadcast; at most one is a number."""
    recorded = any(isinstance(each, Tensor) and each.requires_grad for each in (dividend, divisor))
    if not (torch.is_grad_enabled() and recorded):
        return dividend / divisor
    like = dividend if isinstance(dividend, Tensor) else divisor
    # a device fills in a number without a copy that the host would wait for
    made = [each if isinstance(each, Tensor) else torch.full_like(like, each) for each in (dividend, divisor)]  # type: ignore[arg-type]
    result: Tensor = _Quotient.apply(*torch.broadcast_tensors(*made))  # type: ignore[no-untyped-call]
    return result


class _Sqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, radicand: Tensor) -> Tensor:
        root = radicand.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (root,) = ctx.saved_tensors
        return torch.where((grad == 0) | (root == 0), 0.0, grad / (2 * root))


class _Quotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dividend: Tensor, divisor: Tensor) -> Tensor:
        ctx.save_for_backward(dividend, divisor)
        return dividend / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dividend, divisor = ctx.saved_tensors
        by_dividend = torch.where(grad == 0, 0.0, grad / divisor)
        # not over the divisor's square, which is 0 already for one of 1e-300
        return by_dividend, torch.where(grad == 0, 0.0, -by_dividend * (dividend / divisor))
