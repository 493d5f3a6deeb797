"""Read scales: a number, one for each sample or step, or a tensor on any device; and put them side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._plain_tensors import check_that_they_are_plain

Scale: TypeAlias = "float | Sequence[float] | Tensor"

_HOST = torch.device("cpu")
_LARGEST = torch.finfo(torch.float32).max  # the kernels compute in float32


def scale_columns(*columns: float | Tensor) -> Tensor:
    """Return shape (steps or 1, batch or 1, columns), from numbers and scales of shape (steps or 1, batch or 1)."""
    scales = [c for c in columns if isinstance(c, Tensor)]
    if not scales:  # cheap, as guidance may be made in the loop
        return torch.tensor([[columns]], dtype=torch.float64, device="cpu")
    like = next((scale for scale in scales if scale.device != _HOST), scales[0])
    for what, dim in (("steps", 0), ("samples", 1)):
        sizes = {scale.shape[dim] for scale in scales} - {1}
        if len(sizes) > 1:
            raise ValueError(f"guidance_scales: expected scales for as many {what} everywhere, got {sorted(sizes)}")
    made = [
        c.to(like.device, like.dtype)
        if isinstance(c, Tensor)
        else torch.full((), c, dtype=like.dtype, device=like.device)
        for c in columns  # a device fills in numbers without a copy that the host would wait for
    ]
    return torch.stack(torch.broadcast_tensors(*made), -1)


def stand_in_columns(num_predictions: int, scales: Iterable[float | Tensor]) -> Tensor:
    """Return columns in the place of weights that are made at each step, for as many steps and samples as scales."""
    shape = scale_columns(0.0, *scales).shape[:2]
    return conditional_columns(num_predictions).expand(*shape, -1)


def conditional_columns(num_predictions: int) -> Tensor:
    """Return the columns of the conditional prediction alone, the second one, of shape (1, 1, num_predictions + 1)."""
    second = [float(term == 1) for term in range(1, num_predictions)]
    return scale_columns(1.0, *second, 0.0)


def as_scale(name: str, value: Scale) -> float | Tensor:
    """Return a scale as a number, or as shape (steps or 1, batch or 1): float64 on the host, else float32."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{name}: expected a finite number (in float32), got {value}")
        return float(value)
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name}: expected a tensor of real numbers, got one of {value.dtype}")
        dtype = torch.float64 if value.device == _HOST else torch.float32
        if torch.compiler.is_compiling():
            scale = value.to(dtype)
        else:
            check_that_they_are_plain([value], name)
            watched = value.requires_grad and not value.is_inference()  # which torch would count no changes of
            scale = _Watched.apply(value, dtype, name) if watched else value.to(dtype)  # type: ignore[no-untyped-call]
    elif not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected a number, a sequence of numbers or a tensor, got {type(value).__name__}")
    else:
        try:
            scale = torch.tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected a sequence of numbers, got {value!r}") from error
    if scale.dim() > 2 or scale.numel() == 0:
        raise ValueError(
            f"{name}: expected a number, shape (batch,), (steps, 1) or (steps, batch), got shape {_shape(scale)}"
        )
    if scale.device == _HOST and not bool((scale.detach().abs() <= _LARGEST).all()):
        bad = next(v for v in scale.flatten().tolist() if not abs(v) <= _LARGEST)
        raise ValueError(f"{name}: expected finite values (in float32), got {bad}")
    return scale.reshape(1, -1) if scale.dim() < 2 else scale


class _Watched(torch.autograd.Function):
    """A copy of a scale, whose gradient is refused once the scale was changed in place: the copy is as it was."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        ctx.alias, ctx.version, ctx.name = value.detach(), value._version, name
        return value.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.alias._version != ctx.version:
            raise RuntimeError(
                f"{ctx.name}: expected a tensor that is as it was when the guidance was made of it, got one that was "
                "changed in place since, as optimizers do; make the guidance anew after each change"
            )
        return grad.to(ctx.alias.dtype), None, None


def as_scale_per_step(name: str, value: Sequence[float] | Tensor) -> Tensor:
    """Return scales given for each step, as shape (steps, 1)."""
    scale = as_scale(name, value)
    if not isinstance(scale, Tensor) or scale.shape[0] != 1:
        got = scale if not isinstance(scale, Tensor) else f"shape {_shape(scale)}"
        raise ValueError(f"{name}: expected one number a step, shape (steps,), got {got}")
    return scale.reshape(-1, 1)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
