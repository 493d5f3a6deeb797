"""Choose where sampling begins: at noise, at a noised image (image-to-image), or beside a known one (inpainting)."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ..solvers.begin import padded_to_begin_at
from ..solvers.table import StepTable


def first_sample(
    table: StepTable, x_T: Tensor, image: Tensor | None, mask: Tensor | None, strength: float | None
) -> tuple[StepTable, Tensor, int, Tensor | None]:
    """Return the table, the first sample, the model call that it is for, and the mask in the sample's shape.

    The table is the given one, or, where sampling begins later and calls go on from earlier ones, one of as many calls
    that begins there.
    """
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise ValueError(f"{name}: expected image= with it, got None")
        check_defined(table, 0)
        return table, _scaled(x_T, table.init_noise_sigma), 0, None
    _check_image(image, x_T)
    if strength is None and mask is None:
        raise ValueError("strength: expected a number from 0 to 1 with image=, or mask=, got None")
    number = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
    if strength is not None and (not number or not 0 <= strength <= 1):
        raise ValueError(f"strength: expected a number from 0 to 1, got {strength!r}")
    mask = None if mask is None else _checked_mask(mask, x_T, table)
    levels = table.levels
    if levels is None:
        raise ValueError(f"table: expected one whose levels are known, such as ddim's, with image=, got {table!r}")
    skipped = table.steps - min(int(table.steps * (1.0 if strength is None else strength)), table.steps)
    if skipped == table.steps:
        return table, image, len(table), mask
    table, begin = padded_to_begin_at(table, skipped)
    check_defined(table, begin)
    alpha, sigma = (float(values[begin]) for values in (table.levels or levels))
    wide = torch.promote_types(x_T.dtype, torch.float32)
    if begin == 0 and mask is not None:  # from noise alone, as large as the samples of that level
        radius = math.hypot(alpha, sigma)
        return table, _scaled(x_T, radius if table.init_noise_sigma == 1 else table.init_noise_sigma), 0, mask
    return table, alpha * image.to(wide) + sigma * x_T.to(wide), begin, mask


def _scaled(x_T: Tensor, deviation: float) -> Tensor:
    """Return noise of this standard deviation: x_T itself where that is 1."""
    if math.isclose(deviation, 1.0):
        return x_T
    return deviation * x_T.to(torch.promote_types(x_T.dtype, torch.float32))


def _check_image(image: Tensor, x_T: Tensor) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = str(image.dtype) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a tensor of floating-point numbers, got {got}")
    if image.shape != x_T.shape or image.device != x_T.device:
        expected, got = (f"shape {tuple(tensor.shape)} on {tensor.device}" for tensor in (x_T, image))
        raise ValueError(f"image: expected {expected}, as x_T, got {got}")


def _checked_mask(mask: Tensor, x_T: Tensor, table: StepTable) -> Tensor:
    """Return the mask in the sample's shape."""
    columns = table.coefficients()
    if not bool(((columns["known_sample"] != 0) | (columns["known_noise"] != 0)).all()):
        raise ValueError(
            f"mask: expected a table whose columns known_sample and known_noise say the level of the known part, got "
            f"{table!r}, where both are 0"
        )
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
    goes_back = bool((columns["out_anchor"] != 0).any())
    if goes_back and mask.device.type == "cpu" and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"mask: expected 0 and 1 alone with {table.name}, whose steps go back to samples of which a part was not "
            "blended yet, got values between"
        )
    return mask


def check_defined(table: StepTable, begin: int) -> None:
    """Refuse to run over calls at which the solver is not defined."""
    bad = [row for row in sorted(table.undefined_rows) if row >= begin]
    if bad:
        raise ValueError(
            f"table: expected steps at which {table.name} is defined, got step {bad[0]}: {table.undefined}"
        )
