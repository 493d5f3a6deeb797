"""The Triton kernel of a step's backward pass: csrc/kernels/cpu/backward.h over tiles of a sample."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernel import (
    CLIP,
    HIST_SAMPLE,
    HIST_SLOT,
    HIST_X0,
    LOGVAR_BASE,
    LOGVAR_SPAN,
    NUM_COLUMNS,
    OUT_ANCHOR,
    OUT_GRAD,
    OUT_HISTORY,
    OUT_NOISE,
    OUT_PRED,
    OUT_SAMPLE,
    OUT_VAR_GRAD,
    OUT_X0,
    SLOTS,
    X0_GRAD,
    X0_NOISE,
    X0_PRED,
    X0_SAMPLE,
    X0_SCALE,
    _exp,
    _guided,
    _in_table,
    _load,
    _place,
    _position_of,
    _store,
)


@triton.jit
def _loaded(pointer, stride, sample, first, inside, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile; zeros of what is absent and beyond the sample."""
    values = tl.zeros((BLOCK,), tl.float32)
    if pointer is not None:
        values = _load(_place(pointer, stride, sample, first, BLOCK), inside, EVEN)
        values = tl.where(inside, values, 0.0)
    return values


@triton.jit
def _write(pointer, stride, sample, first, values, inside, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    if pointer is not None:
        _store(_place(pointer, stride, sample, first, BLOCK), values, inside, EVEN)


@triton.jit
def _write_predictions(
    to, strides, w, of_m, sample, first, inside, K: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each prediction, by its weight; column 0 of the weights holds the sum of all."""
    if K > 0:
        of_first = tl.load(w)
        for k in tl.static_range(1, K):
            weight = tl.load(w + k)
            of_first -= weight
            _write(to[k], strides[k], sample, first, weight * of_m, inside, EVEN, BLOCK)
        _write(to[0], strides[0], sample, first, of_first * of_m, inside, EVEN, BLOCK)


@triton.jit
def _write_history(
    to, stride, grad_left, left_stride, r, of_next, slot, slots, batch, sample, first, inside,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of what earlier calls have left; of an entry that stays, those of later calls as well."""
    for k in tl.static_range(SLOTS):
        if k < slots:
            of_entry = tl.load(r + OUT_HISTORY + k) * of_next
            if grad_left is not None:
                later = _loaded(grad_left, left_stride, k * batch + sample, first, inside, EVEN, BLOCK)
                of_entry += tl.where(slot == k, 0.0, later)
            _write(to, stride, k * batch + sample, first, of_entry, inside, EVEN, BLOCK)


@triton.jit
def _add_up(
    place, predictions, strides, of_m, sample, first, inside, K: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what a tile adds to the gradients of the predictions' weights."""
    if K > 0:
        p0 = _loaded(predictions[0], strides[0], sample, first, inside, EVEN, BLOCK)
        tl.store(place, tl.sum(of_m * p0, 0))
        for k in tl.static_range(1, K):
            p = _loaded(predictions[k], strides[k], sample, first, inside, EVEN, BLOCK)
            tl.store(place + k, tl.sum(of_m * (p - p0), 0))
    else:
        tl.store(place, 0.0)


_NOT_SPECIALIZED = ["weights_step_stride", "weights_batch_stride", "indices_stride", "index", "steps", "slots", "batch"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def backward_kernel(
    came, inputs, outputs, sums, came_strides, input_strides, output_strides, size,
    weights_step_stride, weights_batch_stride, indices_stride, index, steps, slots, batch,
    K: tl.constexpr, CLIPS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of one sample.

    came: the gradients of what the step wrote; inputs: of its arguments, what is read; outputs: in the order of
    ``Gradients``, but the weights'. sums: what a tile adds to those, (batch, tiles, columns). None where absent.
    CLIPS: whether sample and predictions are there for the clip's mask.
    """
    grad_out, grad_original, grad_left = came
    x, predictions, rows, weights, indices, gradient, variance, noise, mask = inputs
    to_sample, to_predictions, to_gradient, to_variance, to_noise, to_anchor, to_history = outputs
    out_stride, original_stride, left_stride = came_strides
    x_stride, prediction_strides, gradient_stride, variance_stride, noise_stride, mask_stride = input_strides
    (
        to_sample_stride, to_prediction_strides, to_gradient_stride, to_variance_stride, to_noise_stride,
        to_anchor_stride, to_history_stride,
    ) = output_strides  # fmt: skip
    tiles = (size - 1) // BLOCK + 1
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first = tile * BLOCK
    inside = tl.arange(0, BLOCK) < size - first
    row, _, _ = _position_of(sample, index, indices, indices_stride, None, 0)
    row, in_table = _in_table(row, steps)
    r, w = rows + row * NUM_COLUMNS, weights + row * weights_step_stride + sample * weights_batch_stride

    of_next = _loaded(grad_out, out_stride, sample, first, inside, EVEN, BLOCK)
    of_next = tl.where(in_table, of_next, float("nan"))
    if mask is not None:
        of_next *= _loaded(mask, mask_stride, sample, first, inside, EVEN, BLOCK)
    of_original = _loaded(grad_original, original_stride, sample, first, inside, EVEN, BLOCK)
    left = tl.zeros((BLOCK,), tl.float32)
    slot = tl.load(r + HIST_SLOT)
    if grad_left is not None:  # noqa: SIM102  # the one is known when it is compiled, the other is not
        if (slot >= 0.0) & (slot < slots):
            left = _loaded(grad_left, left_stride, slot.to(tl.int32) * batch + sample, first, inside, EVEN, BLOCK)
    scale = tl.load(w + (K if K > 0 else 1))
    g = _loaded(gradient, gradient_stride, sample, first, inside, EVEN, BLOCK)
    x0_scale = tl.load(r + X0_SCALE)
    q = tl.fma(tl.load(r + OUT_X0), of_next, tl.load(r + HIST_X0) * left) + of_original
    if CLIPS:
        values = _loaded(x, x_stride, sample, first, inside, EVEN, BLOCK)
        guided = _guided(predictions, prediction_strides, w, sample, first, inside, K, EVEN, BLOCK)
        x0 = tl.fma(tl.load(r + X0_PRED), guided, tl.load(r + X0_SAMPLE) * values)
        x0 = tl.fma(tl.load(r + X0_GRAD) * scale, g, x0) * x0_scale
        clip = tl.load(r + CLIP)
        q = tl.where((x0 > clip) | (x0 < -clip), 0.0, q)
    q *= x0_scale

    of_sample = tl.fma(tl.load(r + X0_SAMPLE), q, tl.load(r + OUT_SAMPLE) * of_next)
    of_sample = tl.fma(tl.load(r + HIST_SAMPLE), left, of_sample)
    _write(to_sample, to_sample_stride, sample, first, of_sample, inside, EVEN, BLOCK)
    of_m = tl.fma(tl.load(r + X0_PRED), q, tl.load(r + OUT_PRED) * of_next)
    if to_predictions is not None:
        _write_predictions(to_predictions, to_prediction_strides, w, of_m, sample, first, inside, K, EVEN, BLOCK)

    # The gradient, the variance and the noise
    sigma = tl.full((BLOCK,), 1.0, tl.float32)
    span = tl.load(r + LOGVAR_SPAN)
    if variance is not None:
        v = _loaded(variance, variance_stride, sample, first, inside, EVEN, BLOCK)
        sigma = _exp(0.5 * tl.fma(span, v, tl.load(r + LOGVAR_BASE)))
    shift, var_grad, deviation = tl.load(r + OUT_GRAD), tl.load(r + OUT_VAR_GRAD), tl.load(r + OUT_NOISE)
    if variance is not None:
        of_gradient = tl.fma(tl.load(r + X0_GRAD), q, (shift + var_grad * sigma * sigma) * of_next)
    else:
        of_gradient = tl.fma(tl.load(r + X0_GRAD), q, shift * of_next)
    _write(to_gradient, to_gradient_stride, sample, first, scale * of_gradient, inside, EVEN, BLOCK)
    of_noise = tl.fma(deviation * sigma, of_next, tl.load(r + X0_NOISE) * of_original)
    _write(to_noise, to_noise_stride, sample, first, of_noise, inside, EVEN, BLOCK)
    if to_variance is not None:
        z = _loaded(noise, noise_stride, sample, first, inside, EVEN, BLOCK)
        moved = tl.fma(0.5 * deviation * sigma, z, var_grad * sigma * sigma * scale * g)
        _write(to_variance, to_variance_stride, sample, first, span * moved * of_next, inside, EVEN, BLOCK)

    # What earlier calls have left
    of_anchor = tl.load(r + OUT_ANCHOR) * of_next
    _write(to_anchor, to_anchor_stride, sample, first, of_anchor, inside, EVEN, BLOCK)
    if to_history is not None:
        _write_history(
            to_history, to_history_stride, grad_left, left_stride, r, of_next, slot, slots, batch, sample, first,
            inside, EVEN, BLOCK,
        )  # fmt: skip
    if sums is not None:
        columns: tl.constexpr = (K if K > 1 else 1) + 1
        place = sums + (sample * tiles + tile) * columns
        _add_up(place, predictions, prediction_strides, of_m, sample, first, inside, K, EVEN, BLOCK)
        tl.store(place + columns - 1, tl.sum(of_gradient * g, 0))
