"""Where a loop begins: at noise, at a noised image (image-to-image), or beside a known part of one (inpainting)."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from ..solvers.table import StepTable


def start(
    table: StepTable, x_T: Tensor, image: Tensor | None, mask: Tensor | None, strength: float | None
) -> tuple[Tensor, int, Tensor | None]:
    """The first sample, the step that it is for, and the mask in the sample's shape."""
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise ValueError(f"{name}: expected image= with it, got None")
        check_rows(table, 0)
        return x_T, 0, None
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = str(image.dtype) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a tensor of floating-point numbers, got {got}")
    if image.shape != x_T.shape or image.device != x_T.device:
        ours, theirs = (f"shape {tuple(t.shape)} on {t.device}" for t in (x_T, image))
        raise ValueError(f"image: expected {ours}, as x_T, got {theirs}")
    if strength is None and mask is None:
        raise ValueError("strength: expected a number from 0 to 1 with image=, or mask=, got None")
    number = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
    if strength is not None and (not number or not 0 <= strength <= 1):
        raise ValueError(f"strength: expected a number from 0 to 1, got {strength!r}")
    if mask is not None:
        if not isinstance(mask, Tensor) or not (mask.is_floating_point() or mask.dtype == torch.bool):
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a tensor of bool or floating-point numbers, got {got}")
        try:
            mask = mask.expand(x_T.shape)
        except RuntimeError:
            expected = tuple(x_T.shape)
            raise ValueError(f"mask: expected a shape that broadcasts to {expected}, got {tuple(mask.shape)}") from None
        if mask.device.type == "cpu" and not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"mask: expected values from 0 to 1, got {mask.min().item():g} to {mask.max().item():g}")
    if table.levels is None:
        raise ValueError(f"table: expected one of ddpm or ddim with image=, got {table!r}, which knows no levels")
    steps = len(table)
    begin = steps - min(int(steps * (1.0 if strength is None else strength)), steps)
    if begin == steps:
        return image, begin, mask
    check_rows(table, begin)
    if begin == 0 and mask is not None:
        return x_T, 0, mask
    alpha, sigma = (float(values[begin]) for values in table.levels)
    wide = torch.promote_types(x_T.dtype, torch.float32)
    return alpha * image.to(wide) + sigma * x_T.to(wide), begin, mask


def check_rows(table: StepTable, begin: int) -> None:
    """Refuse a run over steps at which the solver is not defined."""
    if table.scales_inputs:
        raise ValueError(f"table: expected in_scale of 1, as nothing says the first input's scale, got {table!r}")
    bad = [row for row in sorted(table.undefined_rows) if row >= begin]
    if bad:
        raise ValueError(
            f"table: expected steps at which {table.name} is defined, got step {bad[0]}: {table.undefined}"
        )
