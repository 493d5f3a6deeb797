"""The specification: one guided step in plain torch, any device and dtype. Every other backend is tested against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...guidance.encoded import decode
from ...solvers.table import ROW_COLUMNS
from ..backward import Gradients
from ..memory import empty_like, in_blocks
from ..noise import portable_noise
from ..operator import StepArguments, library
from ..original import combined, per_sample, unclipped
from ..thresholds import thresholds_of
from ..weigh import combined_in_blocks, position_of, selected, split, weights_of, with_gradient_scale
from .registry import Backend


def backend() -> Backend:
    """Return the backend, which runs everywhere."""
    return Backend("reference", guided_step, None, "plain torch, the specification", clipped=guided_step_clipped)


def guided_step(*arguments: object) -> None:
    """Write one step to ``out``, the predicted original sample to ``original``, the next model input to ``staged``.

    The arguments are the fields of ``StepArguments``. The arithmetic is in the dtype of ``rows`` (float32 or float64)
    and rounds once, at the end.

    Raises:
        ValueError: ``philox`` is given: plain torch draws torch's noise by ``torch.randn``.
    """
    a = StepArguments(*arguments)  # type: ignore[arg-type]
    if a.philox is not None:
        raise ValueError("generator: the reference takes a torch.Generator, and no DeviceGenerator")
    sample, batch, dtype = a.sample, a.sample.shape[0], a.rows.dtype
    steps, first, live = position_of(a)
    row = {name: per_sample(a.rows.index_select(0, steps)[:, i], sample) for i, name in enumerate(ROW_COLUMNS)}
    made = None if a.program is None else _made(a, (steps, first))
    if made is not None and made.dim() == 3:
        a, made = combined_in_blocks(a, made), None
    count = a.weights.shape[-1] - 1
    each = split(a.predictions, count, batch)
    weights = selected(a.weights, steps, batch) if made is None else made
    weight = [per_sample(w, sample) for w in weights.unbind(-1)]
    scale = weight[count]

    x = sample.to(dtype)
    m = combined(weight, [prediction.to(dtype) for prediction in each], x)
    x0 = unclipped(row, x, m, a.gradient, scale)
    limit = row["clip"]
    if a.inverse_thresholds is not None:
        inverse = thresholds_of(a, x0).reciprocal()
        a.inverse_thresholds[:, 0].copy_(inverse)
        x0, limit = x0 * per_sample(inverse, x), torch.where(row["quantile"] > 0, 1.0, limit)
    x0 = torch.minimum(torch.maximum(x0, -limit), limit)

    result = row["out_x0"] * x0 + row["out_sample"] * x
    result = result + torch.where(row["out_pred"] != 0, row["out_pred"] * m, 0.0)  # m may have overflowed
    shift, deviation = row["out_grad"], row["out_noise"]
    if a.variance is not None:
        log_variance = row["logvar_base"] + row["logvar_span"] * a.variance.to(dtype)
        shift = shift + torch.where(row["out_var_grad"] != 0, row["out_var_grad"] * torch.exp(log_variance), 0.0)
        deviation = torch.where(deviation != 0, deviation * torch.exp(0.5 * log_variance), 0.0)
    if a.gradient is not None:
        result = result + shift * scale * a.gradient.to(dtype)
    noise = a.noise
    if a.seeds is not None:
        step = steps - first
        noise = portable_noise(a.seeds, sample.shape, step=step if len(step) != 1 else step[0])
    returned = x0
    if noise is not None:
        result = result + deviation * noise.to(dtype)
        returned = x0 + torch.where(
            row["x0_noise"] != 0, row["x0_noise"] * noise.to(dtype), 0.0
        )  # out may be the noise
    result, entries = _with_history(a, row, result, x, x0)
    if a.mask is not None and a.known is not None and a.known_noise is not None:
        result = _inpainted(row, result, a.mask.to(dtype), a.known.to(dtype), a.known_noise.to(dtype))

    finished = None if a.cursor is None else ~per_sample(live, sample)
    if a.staged is not None:
        for start in range(0, a.staged.shape[0], batch or 1):
            _write(a.staged[start : start + batch], row["in_scale"] * result, finished)
    _write(a.out, result, finished)
    if a.original is not None:
        _write(a.original, returned, finished)
    for slot, (entry, left) in enumerate(entries):
        others = row["hist_slot"] != slot
        _write(entry, left, others if finished is None else finished | others)
    if a.cursor is not None:
        _advance(a.cursor, a.timestep, a.rows, steps, live)


library.impl("guided_step", guided_step, "CompositeExplicitAutograd")


def _made(a: StepArguments, position: tuple[Tensor, Tensor]) -> Tensor:
    """Return the weights that each sample's program makes of its moments, and write them down.

    They are of shape (batch, columns), or of (batch, groups, columns), not rounded yet, where there is room for them of
    each group.
    """
    assert a.program is not None
    assert a.parameters is not None
    assert a.made is not None
    batch, terms, count = a.sample.shape[0], a.made.shape[1] - 1, a.weights.shape[-1] - 1
    predictions, of, dims = split(a.predictions, count, batch), a, None
    if len(a.made) > batch > 0:
        groups, dims = len(a.made) // batch, (2,)
        of = a._replace(sample=in_blocks(a.sample, groups))
        predictions = [in_blocks(prediction, groups) for prediction in predictions]
    given = enumerate(selected(a.parameters, position[0], batch).unbind(-1))
    parameters = {f"parameter_{k}": values for k, values in given}
    programs = [decode(words, terms, a.parameters.shape[-1]) for words in a.program.tolist()]
    tables = [weights_of(of, predictions, program, position, parameters, dims) for program in programs]
    weights = tables[0] if len(tables) == 1 else torch.stack([table[k] for k, table in enumerate(tables)])
    scale = selected(a.weights, position[0], batch)[:, -1:]
    made = with_gradient_scale(weights, count, scale)
    a.made.copy_(made.view(a.made.shape))
    return made.to(a.rows.dtype) if dims is None else made


def _with_history(
    a: StepArguments, row: dict[str, Tensor], result: Tensor, x: Tensor, x0: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Add the anchor and the history's entries, where they have a factor; return each slot, and what it may get."""
    if a.anchor is not None:
        result = result + torch.where(row["out_anchor"] != 0, row["out_anchor"] * a.anchor.to(x.dtype), 0.0)
    if a.history is None:
        return result, []
    slots = a.history.unflatten(0, (-1, len(x))).unbind(0) if len(x) else []
    for slot, entry in enumerate(slots):
        factor = row[f"out_hist_{slot}"]
        result = result + torch.where(factor != 0, factor * entry, 0.0)
    left = row["hist_x0"] * x0 + torch.where(row["hist_sample"] != 0, row["hist_sample"] * x, 0.0)
    return result, [(entry, left) for entry in slots]


def _inpainted(row: dict[str, Tensor], result: Tensor, painted: Tensor, known: Tensor, noise: Tensor) -> Tensor:
    """Put the known image, noised to the level of the next sample, where the mask is 0."""
    level = row["known_sample"] * known + row["known_noise"] * noise
    blended = painted * result + (1 - painted) * level
    return torch.where(painted == 1, result, torch.where(painted == 0, level, blended))


def _advance(cursor: Tensor, timestep: Tensor | None, rows: Tensor, steps: Tensor, live: Tensor) -> None:
    """Move the cursors on, and write the timesteps of the next model call."""
    if timestep is not None:
        following = rows[:, ROW_COLUMNS.index("in_timestep")].index_select(0, steps)
        repeated = timestep.reshape(-1, len(steps))
        repeated.copy_(torch.where(live, following.to(timestep.dtype), repeated))
    cursor[:, 0] += live


def _write(out: Tensor, values: Tensor, finished: Tensor | None) -> None:
    out.copy_(values if finished is None else torch.where(finished, out, values.to(out.dtype)))


# ---- Backward ----


def guided_step_clipped(*arguments: object, clipped: Tensor) -> None:
    """Write one step, and in bits where it clips x_0; the arguments are those of the operator of this name."""
    a = StepArguments(*arguments)  # type: ignore[arg-type]
    if a.sample.numel():
        batch, dtype = len(a.sample), a.rows.dtype
        steps, _, _ = position_of(a)
        row = {name: per_sample(a.rows.index_select(0, steps)[:, i], a.sample) for i, name in enumerate(ROW_COLUMNS)}
        weight = [per_sample(w, a.sample) for w in selected(a.weights, steps, batch).unbind(-1)]
        x = a.sample.to(dtype)
        each = [prediction.to(dtype) for prediction in split(a.predictions, len(weight) - 1, batch)]
        x0 = unclipped(row, x, combined(weight, each, x), a.gradient, weight[-1])
        found = empty_like(a.sample, torch.uint8).copy_(x0.abs() > row["clip"])
        ones = torch.nn.functional.pad(_as_they_lie(found), (0, -x0[0].numel() % 8)).unflatten(1, (-1, 8))
        torch.sum(ones << torch.arange(8, dtype=torch.uint8, device=x.device), -1, dtype=torch.uint8, out=clipped)
    guided_step(*arguments)


def _as_they_lie(tensor: Tensor) -> Tensor:
    """Return a view of shape (batch, elements of a sample), in their order in memory."""
    return in_blocks(tensor, 1)[:, 0] if tensor.dim() > 1 else tensor[:, None]


def _clips(clipped: Tensor, sample: Tensor) -> Tensor:
    """Return where the bits say that x_0 was clipped, in the sample's layout."""
    ones = clipped[..., None] >> torch.arange(8, dtype=torch.uint8, device=clipped.device) & 1
    found = empty_like(sample, torch.bool)
    if sample.numel():
        _as_they_lie(found).copy_(ones.flatten(1)[:, : sample[0].numel()])
    return found


def guided_step_backward(*arguments: object, **gradients: Any) -> None:
    """Write the gradients of a step's inputs: the formulas are in csrc/kernels/cpu/backward.h.

    The arguments are the fields of ``StepArguments``, and by name those of ``Gradients``.
    """
    a, b = StepArguments(*arguments), Gradients(**gradients)  # type: ignore[arg-type]
    sample, batch, dtype = a.sample, a.sample.shape[0], a.rows.dtype
    steps, _, _ = position_of(a)
    row = {name: per_sample(a.rows.index_select(0, steps)[:, i], sample) for i, name in enumerate(ROW_COLUMNS)}
    weights = selected(a.weights, steps, batch)
    count = weights.shape[-1] - 1
    weight = [per_sample(w, sample) for w in weights.unbind(-1)]
    scale = weight[count]
    each = [prediction.to(dtype) for prediction in split(a.predictions, count, batch)]
    nothing = torch.zeros_like(sample, dtype=dtype)

    came, of_original = _or_nothing(b.grad_out, nothing), _or_nothing(b.grad_original, nothing)
    if a.mask is not None:
        came = a.mask.to(dtype) * came
    later = _slots_of(b.grad_left, batch)
    left = sum((torch.where(row["hist_slot"] == slot, grad, 0.0) for slot, grad in enumerate(later)), nothing)
    q = row["out_x0"] * came + row["hist_x0"] * left + of_original
    if b.clipped is None:
        x0 = unclipped(row, sample.to(dtype), combined(weight, each, nothing), a.gradient, scale)
        clips = x0.abs() > row["clip"]
    else:
        clips = _clips(b.clipped, sample)
    q = row["x0_scale"] * torch.where(clips, 0.0, q)

    of_m = row["x0_pred"] * q + row["out_pred"] * came
    shift, deviation = row["out_grad"], row["out_noise"]
    if a.variance is not None:
        log_variance = row["logvar_base"] + row["logvar_span"] * a.variance.to(dtype)
        shift = shift + row["out_var_grad"] * torch.exp(log_variance)
        deviation = deviation * torch.exp(0.5 * log_variance)
    unscaled = row["x0_grad"] * q + shift * came

    _give(b.grad_sample, row["x0_sample"] * q + row["out_sample"] * came + row["hist_sample"] * left)
    factors = [weight[0] - sum(weight[1:count]), *weight[1:count]]
    given = [] if not b.grad_predictions else split(list(b.grad_predictions), count, batch)
    for grad, factor in zip(given, factors, strict=False):
        grad.copy_(factor * of_m)
    _give(b.grad_gradient, scale * unscaled)
    _give(b.grad_noise, deviation * came + row["x0_noise"] * of_original)
    _give(b.grad_anchor, row["out_anchor"] * came)
    for slot, grad in enumerate(_slots_of(b.grad_history, batch)):
        stays = torch.where(row["hist_slot"] == slot, 0.0, later[slot]) if later else nothing
        grad.copy_(row[f"out_hist_{slot}"] * came + stays)
    if b.grad_variance is not None and a.variance is not None:
        variance_scale = torch.exp(row["logvar_base"] + row["logvar_span"] * a.variance.to(dtype))
        moved = 0.5 * deviation * _or_nothing(a.noise, nothing)
        moved = moved + row["out_var_grad"] * variance_scale * scale * _or_nothing(a.gradient, nothing)
        b.grad_variance.copy_(row["logvar_span"] * moved * came)
    if b.grad_weights is not None:
        factors = [p - each[0] if k else p for k, p in enumerate(each)] or [nothing]
        parts = [(of_m * factor).double() for factor in factors]
        parts.append((unscaled * _or_nothing(a.gradient, nothing)).double())
        b.grad_weights.copy_(torch.stack([part.flatten(1).sum(1) for part in parts], 1))


library.impl("guided_step_backward", guided_step_backward, "CompositeExplicitAutograd")
library.impl("guided_step_clipped", guided_step_clipped, "CompositeExplicitAutograd")


def _or_nothing(grad: Tensor | None, nothing: Tensor) -> Tensor:
    return nothing if grad is None else grad.to(nothing.dtype)


def _slots_of(history: Tensor | None, batch: int) -> list[Tensor]:
    return [] if history is None or not batch else list(history.unflatten(0, (-1, batch)).unbind(0))


def _give(grad: Tensor | None, values: Tensor) -> None:
    if grad is not None:
        grad.copy_(values)
