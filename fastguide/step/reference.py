"""The specification: one guided step in plain torch, any device and dtype. Every other backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers.table import ROW_COLUMNS
from .noise import portable_noise


def guided_step(
    out: Tensor,
    original: Tensor | None,
    staged: Tensor | None,
    sample: Tensor,
    predictions: list[Tensor],
    rows: Tensor,
    weights: Tensor,
    index: int,
    indices: Tensor | None,
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None = None,
    philox: Tensor | None = None,
    philox_threads: int = 0,
    cursor: Tensor | None = None,
    timestep: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
) -> None:
    """Write one step to ``out``, the predicted original sample to ``original`` and the next model input to ``staged``.

    The arithmetic is in the dtype of ``rows`` (float32 or float64) and rounds once, at the end. ``indices``, int64 of
    shape () or (batch,), takes the place of ``index``. The other arguments are those of ``fastguide.guided_step``;
    ``philox``, torch's CUDA stream inside a kernel, is refused: plain torch draws by ``torch.randn``. ``cursor`` and
    ``timestep``, of a ``Cursor``, take the place of the index, are moved on, and leave finished samples as they are.
    """
    if philox is not None:
        raise ValueError("generator: the reference takes a torch.Generator, and no DeviceGenerator")
    batch = sample.shape[0]
    dtype = rows.dtype
    steps = torch.full((1,), index, device=rows.device) if indices is None else indices.reshape(-1)
    live, first = torch.ones_like(steps, dtype=torch.bool), torch.zeros_like(steps)
    if cursor is not None:
        steps, end, first, _ = cursor.unbind(1)
        live = steps < end
        steps = torch.where(live, steps, 0)
    steps = torch.where(steps < 0, rows.shape[0], steps)  # compiled code would count from the end; now it refuses
    row = {name: _per_sample(rows.index_select(0, steps)[:, i], sample) for i, name in enumerate(ROW_COLUMNS)}
    weight = [_per_sample(w, sample) for w in _selected(weights, steps, batch).unbind(-1)]
    scale = weight[-1]

    x = sample.to(dtype)
    p = [prediction.to(dtype) for prediction in _split(predictions, weights.shape[-1] - 1, batch)]
    # m = sum_k w_k p_k, anchored at p_0: weight[0] is the sum of all w_k
    m = weight[0] * p[0] if p else torch.zeros_like(x)
    for k in range(1, len(p)):
        m = m + weight[k] * (p[k] - p[0])

    x0 = row["x0_sample"] * x + row["x0_pred"] * m
    if gradient is not None:
        x0 = x0 + row["x0_grad"] * scale * gradient.to(dtype)
    x0 = row["x0_scale"] * x0
    x0 = torch.minimum(torch.maximum(x0, -row["clip"]), row["clip"])

    result = row["out_x0"] * x0 + row["out_sample"] * x
    result = result + torch.where(row["out_pred"] != 0, row["out_pred"] * m, 0.0)  # m may have overflowed
    shift, deviation = row["out_grad"], row["out_noise"]
    if variance is not None:
        log_variance = row["logvar_base"] + row["logvar_span"] * variance.to(dtype)
        shift = shift + torch.where(row["out_var_grad"] != 0, row["out_var_grad"] * torch.exp(log_variance), 0.0)
        deviation = torch.where(deviation != 0, deviation * torch.exp(0.5 * log_variance), 0.0)
    if gradient is not None:
        result = result + shift * scale * gradient.to(dtype)
    if seeds is not None:
        counted = steps - first
        noise = portable_noise(seeds, sample.shape, step=counted if len(counted) != 1 else counted[0])
    if noise is not None:
        result = result + deviation * noise.to(dtype)
    if mask is not None and known is not None and known_noise is not None:
        level = row["known_sample"] * known.to(dtype) + row["known_noise"] * known_noise.to(dtype)
        painted = mask.to(dtype)
        blended = painted * result + (1 - painted) * level
        result = torch.where(painted == 1, result, torch.where(painted == 0, level, blended))

    keep = None if cursor is None else ~_per_sample(live, sample)  # of finished samples
    if staged is not None:
        for start in range(0, staged.shape[0], batch or 1):
            _write(staged[start : start + batch], row["in_scale"] * result, keep)
    _write(out, result, keep)
    if original is not None:
        _write(original, x0, keep)
    if cursor is not None:
        if timestep is not None:
            following = rows[:, ROW_COLUMNS.index("in_timestep")].index_select(0, steps)
            repeated = timestep.reshape(-1, len(steps))
            repeated.copy_(torch.where(live, following.to(timestep.dtype), repeated))
        cursor[:, 0] += live


def _write(out: Tensor, values: Tensor, keep: Tensor | None) -> None:
    out.copy_(values if keep is None else torch.where(keep, out, values.to(out.dtype)))


def _split(predictions: list[Tensor], count: int, batch: int) -> list[Tensor]:
    """All predictions, also where one tensor holds them one after the other along the batch."""
    if len(predictions) == 1 and count > 1:
        return list(predictions[0].unflatten(0, (count, batch)).unbind(0))
    return predictions


def _selected(weights: Tensor, steps: Tensor, batch: int) -> Tensor:
    """The weights of each sample, shape (batch or 1, columns), from (steps or 1, batch or 1, columns)."""
    if weights.shape[0] == 1:
        return weights[0]
    if steps.numel() == 1:
        return weights.index_select(0, steps)[0]
    return weights.expand(-1, batch, -1)[steps, torch.arange(batch, device=weights.device)]


def _per_sample(values: Tensor, sample: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (sample.dim() - 1))
