"""Refuse second derivatives in words, where what a first one was computed of could change it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functions


def refusing_second(gradients: Sequence[Tensor | None], of: Sequence[object], whose: str) -> tuple[Tensor | None, ...]:
    """Return gradients that a backward pass has computed without recording how; one through them raises an error.

    Without ``create_graph=True``, or where nothing of what they depend on requires a gradient, they are returned as
    they are. torch's ``once_differentiable`` looks at the gradients that come in alone.

    Args:
        gradients: what the backward pass returns.
        of: what they depend on, of which some may be no tensor.
        whose: the call that was recorded.
    """
    if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in of):
        return tuple(gradients)
    message = (
        f"{whose}: expected first derivatives alone, as its backward pass is not recorded; for second ones, make the "
        "step of torch's own operations, with the factors of table.coefficients()"
    )
    places = [k for k, gradient in enumerate(gradients) if gradient is not None]
    aliases = [gradients[k].detach().requires_grad_() for k in places]  # type: ignore[union-attr]
    refused = _functions.DelayedError(message.encode(), len(aliases))(*aliases)
    found = dict(zip(places, refused if isinstance(refused, (list, tuple)) else (refused,), strict=True))
    return tuple(found.get(k) for k in range(len(gradients)))
