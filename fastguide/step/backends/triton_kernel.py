"""The Triton kernel: the guided step of csrc/maths/step.h over tiles of a sample. Imported at the first step."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...solvers.table import MAX_SLOTS, ROW_COLUMNS
from ..cursor import CURSOR_COLUMNS
from ..noise import SOURCES
from .triton_noise import INTERPRETED, counted_place, draw_portable, draw_torch, draw_torch_singly, word64

NUM_COLUMNS = tl.constexpr(len(ROW_COLUMNS))
X0_SCALE = tl.constexpr(ROW_COLUMNS.index("x0_scale"))
X0_SAMPLE = tl.constexpr(ROW_COLUMNS.index("x0_sample"))
X0_PRED = tl.constexpr(ROW_COLUMNS.index("x0_pred"))
X0_GRAD = tl.constexpr(ROW_COLUMNS.index("x0_grad"))
CLIP = tl.constexpr(ROW_COLUMNS.index("clip"))
OUT_X0 = tl.constexpr(ROW_COLUMNS.index("out_x0"))
OUT_SAMPLE = tl.constexpr(ROW_COLUMNS.index("out_sample"))
OUT_PRED = tl.constexpr(ROW_COLUMNS.index("out_pred"))
OUT_GRAD = tl.constexpr(ROW_COLUMNS.index("out_grad"))
OUT_VAR_GRAD = tl.constexpr(ROW_COLUMNS.index("out_var_grad"))
OUT_NOISE = tl.constexpr(ROW_COLUMNS.index("out_noise"))
LOGVAR_BASE = tl.constexpr(ROW_COLUMNS.index("logvar_base"))
LOGVAR_SPAN = tl.constexpr(ROW_COLUMNS.index("logvar_span"))
IN_SCALE = tl.constexpr(ROW_COLUMNS.index("in_scale"))
IN_TIMESTEP = tl.constexpr(ROW_COLUMNS.index("in_timestep"))
KNOWN_SAMPLE = tl.constexpr(ROW_COLUMNS.index("known_sample"))
KNOWN_NOISE = tl.constexpr(ROW_COLUMNS.index("known_noise"))
OUT_ANCHOR = tl.constexpr(ROW_COLUMNS.index("out_anchor"))
OUT_HISTORY = tl.constexpr(ROW_COLUMNS.index("out_hist_0"))  # the others follow
HIST_SLOT = tl.constexpr(ROW_COLUMNS.index("hist_slot"))
HIST_X0 = tl.constexpr(ROW_COLUMNS.index("hist_x0"))
HIST_SAMPLE = tl.constexpr(ROW_COLUMNS.index("hist_sample"))
X0_NOISE = tl.constexpr(ROW_COLUMNS.index("x0_noise"))
QUANTILE = tl.constexpr(ROW_COLUMNS.index("quantile"))
SLOTS = tl.constexpr(MAX_SLOTS)

CURSOR_END = tl.constexpr(CURSOR_COLUMNS.index("end"))
CURSOR_FIRST = tl.constexpr(CURSOR_COLUMNS.index("first"))
CURSOR_READERS = tl.constexpr(CURSOR_COLUMNS.index("readers"))
CURSOR_STRIDE = tl.constexpr(len(CURSOR_COLUMNS))

NONE = tl.constexpr(SOURCES.index("none"))
GIVEN = tl.constexpr(SOURCES.index("given"))
TORCH_STREAM = tl.constexpr(SOURCES.index("torch_stream"))
PORTABLE = tl.constexpr(SOURCES.index("portable"))


@triton.jit
def _exp(x):
    """Compute exp to 1 or 2 units in the last place; tl.exp is the hardware's approximation."""
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)


@triton.jit
def _place(pointer, stride, sample, first, BLOCK: tl.constexpr):
    return _place_of(pointer, stride, sample, first, tl.arange(0, BLOCK))


@triton.jit
def _place_of(pointer, stride, sample, first, elements):
    """Return where a sample's elements are, counted from one of it."""
    return pointer + sample.to(tl.int64) * stride + first + elements


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    values = tl.load(pointers) if EVEN else tl.load(pointers, mask=inside)
    return values.to(tl.float32)


@triton.jit
def _store(pointers, values, inside, EVEN: tl.constexpr):
    rounded = values.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers, rounded)
    else:
        tl.store(pointers, rounded, mask=inside)


@triton.jit
def _inpainted(row, result, painted, known, noise):
    """Put the known image, noised to the level of the next sample, where the mask is 0."""
    level = tl.fma(tl.load(row + KNOWN_SAMPLE), known, tl.load(row + KNOWN_NOISE) * noise)
    blended = tl.fma(painted, result, (1.0 - painted) * level)
    return tl.where(painted == 1.0, result, tl.where(painted == 0.0, level, blended))


@triton.jit
def _guided(
    predictions, strides, w, sample, first, inside,
    K: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combine the predictions: m = sum_k w_k p_k, anchored at p_0; column 0 of the weights holds the sum of all w_k."""
    guided = tl.zeros((BLOCK,), tl.float32)
    if K > 0:
        p0 = _load(_place(predictions[0], strides[0], sample, first, BLOCK), inside, EVEN)
        guided = tl.load(w) * p0
        for k in tl.static_range(1, K):
            p = _load(_place(predictions[k], strides[k], sample, first, BLOCK), inside, EVEN)
            guided = tl.fma(tl.load(w + k), p - p0, guided)
    return guided


@triton.jit
def _next_sample(r, values, guided, x0, g, v, z, NOISE: tl.constexpr):
    """Move from x_0 to the next sample; g is the scaled gradient, v the learned variance: None if there is none."""
    result = tl.fma(tl.load(r + OUT_X0), x0, tl.load(r + OUT_SAMPLE) * values)
    out_pred = tl.load(r + OUT_PRED)
    result = tl.where(out_pred != 0.0, tl.fma(out_pred, guided, result), result)  # guided may have overflowed
    shift, deviation = tl.load(r + OUT_GRAD), tl.load(r + OUT_NOISE)
    if v is not None:
        log_variance = tl.fma(tl.load(r + LOGVAR_SPAN), v, tl.load(r + LOGVAR_BASE))
        # Where the variance has no part in the step, it may be anything.
        if g is not None:
            var_grad = tl.load(r + OUT_VAR_GRAD)
            shift = tl.where(var_grad != 0.0, tl.fma(var_grad, _exp(log_variance), shift), shift)
            result = tl.fma(shift, g, result)
        if NOISE != NONE:
            shaken = tl.fma(deviation * _exp(0.5 * log_variance), z, result)
            result = tl.where(deviation != 0.0, shaken, result)
    else:
        if g is not None:
            result = tl.fma(shift, g, result)
        if NOISE != NONE:
            result = tl.fma(deviation, z, result)
    return result


@triton.jit
def _with_history(
    r, in_table, result, x0, values, anchor, anchor_stride, history, history_stride, slots, batch, sample, first,
    elements, inside, EVEN: tl.constexpr,
):  # fmt: skip
    """Add the anchor and what earlier calls left, where the row has a factor; leave something for later ones."""
    if anchor is not None:
        out_anchor = tl.load(r + OUT_ANCHOR)
        if out_anchor != 0.0:
            before = _load(_place_of(anchor, anchor_stride, sample, first, elements), inside, EVEN)
            result = tl.fma(out_anchor, before, result)
    if history is not None:
        for k in tl.static_range(SLOTS):
            factor = tl.load(r + OUT_HISTORY + k)
            if (factor != 0.0) & (k < slots):
                entry = _load(_place_of(history, history_stride, k * batch + sample, first, elements), inside, EVEN)
                result = tl.fma(factor, entry, result)
        slot = tl.load(r + HIST_SLOT)
        if (slot >= 0.0) & (slot < slots):
            hist_sample, left = tl.load(r + HIST_SAMPLE), tl.load(r + HIST_X0) * x0
            left = tl.where(hist_sample != 0.0, tl.fma(hist_sample, values, left), left)
            left = tl.where(in_table, left, float("nan"))
            to = _place_of(history, history_stride, slot.to(tl.int32) * batch + sample, first, elements)
            _store(to, left, inside, EVEN)
    return result


@triton.jit
def _limits(r, inverse_thresholds, sample):
    """Return what x_0 is scaled by and clipped to; with a threshold, it is divided by it, and clipped to 1."""
    x0_scale, clip = tl.load(r + X0_SCALE), tl.load(r + CLIP)
    if inverse_thresholds is not None:  # noqa: SIM102 (known when this is compiled)
        if tl.load(r + QUANTILE) > 0.0:
            x0_scale = x0_scale * tl.load(inverse_thresholds + sample)
            clip = tl.full((), 1.0, tl.float32)
    return x0_scale, clip


@triton.jit
def _step_tile(
    tensors, strides, place, weights_step_stride, weights_batch_stride, copies, slots, batch, z,
    NOISE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make the step of the elements first .. first + BLOCK of a sample; z is noise drawn here."""
    sample, first, size, row, in_table = place
    elements = tl.arange(0, BLOCK)
    inside = elements < size - first
    _, _, _, x, predictions, _, weights, _, _, _, _, _, _, _, _, _, _, _, _, _, _ = tensors
    _, _, _, x_stride, prediction_strides, _, _, _, _, _, _, _, _ = strides
    values = _load(_place(x, x_stride, sample, first, BLOCK), inside, EVEN)
    w = weights + row * weights_step_stride + sample * weights_batch_stride
    guided = _guided(predictions, prediction_strides, w, sample, first, inside, K, EVEN, BLOCK)
    _step_guided(
        tensors, strides, (sample, first, elements, inside, row, in_table), w, copies, slots, batch, values, guided, z,
        NOISE, K, EVEN,
    )  # fmt: skip


@triton.jit
def _step_guided(
    tensors, strides, place, w, copies, slots, batch, values, guided, z,
    NOISE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Make the step of some elements, whose values and guided prediction are there, as csrc/maths/step.h does."""
    (
        out, original, staged, _, _, rows, _, _, gradient, variance, noise, _, _, _, _,
        mask, known, known_noise, anchor, history, inverse_thresholds,
    ) = tensors  # fmt: skip
    (
        out_stride, original_stride, staged_stride, _, _, gradient_stride, variance_stride,
        noise_stride, mask_stride, known_stride, known_noise_stride, anchor_stride, history_stride,
    ) = strides  # fmt: skip
    sample, first, elements, inside, row, in_table = place
    if NOISE == GIVEN:
        z = _load(_place_of(noise, noise_stride, sample, first, elements), inside, EVEN)

    r = rows + row * NUM_COLUMNS
    x0 = tl.fma(tl.load(r + X0_PRED), guided, tl.load(r + X0_SAMPLE) * values)
    g = None
    if gradient is not None:
        scale = tl.load(w + (K if K > 0 else 1))
        g = scale * _load(_place_of(gradient, gradient_stride, sample, first, elements), inside, EVEN)
        x0 = tl.fma(tl.load(r + X0_GRAD), g, x0)
    x0_scale, clip = _limits(r, inverse_thresholds, sample)
    x0 *= x0_scale  # after the cancellation of sample and prediction, not before
    x0 = tl.where(-clip > x0, -clip, x0)  # comparisons in this order let NaN through
    x0 = tl.where(clip < x0, clip, x0)

    v = None
    if variance is not None:
        v = _load(_place_of(variance, variance_stride, sample, first, elements), inside, EVEN)
    result = _next_sample(r, values, guided, x0, g, v, z, NOISE)
    result = _with_history(
        r, in_table, result, x0, values, anchor, anchor_stride, history, history_stride, slots, batch, sample, first,
        elements, inside, EVEN,
    )  # fmt: skip
    if mask is not None:
        k = _load(_place_of(known, known_stride, sample, first, elements), inside, EVEN)
        zk = _load(_place_of(known_noise, known_noise_stride, sample, first, elements), inside, EVEN)
        painted = _load(_place_of(mask, mask_stride, sample, first, elements), inside, EVEN)
        result = _inpainted(r, result, painted, k, zk)
    result = tl.where(in_table, result, float("nan"))
    _store(_place_of(out, out_stride, sample, first, elements), result, inside, EVEN)
    if original is not None:
        if NOISE != NONE:
            x0_noise = tl.load(r + X0_NOISE)
            x0 = tl.where(x0_noise != 0.0, tl.fma(x0_noise, z, x0), x0)
        x0 = tl.where(in_table, x0, float("nan"))
        _store(_place_of(original, original_stride, sample, first, elements), x0, inside, EVEN)
    if staged is not None:
        result *= tl.load(r + IN_SCALE)
        for k in range(copies):
            _store(_place_of(staged, staged_stride, k * batch + sample, first, elements), result, inside, EVEN)


@triton.jit
def _position_of(sample, index, indices, indices_stride, cursor, cursor_stride):
    """Return the sample's row, the row of its first step, and whether it is not finished. See csrc/kernels/cursor.h."""
    # No ternary: Triton compiles both of its sides.
    if cursor is not None:
        place = cursor + sample * cursor_stride
        row = tl.load(place)
        return row, tl.load(place + CURSOR_FIRST), row < tl.load(place + CURSOR_END)
    else:
        if indices is None:  # noqa: SIM108
            row = index.to(tl.int64)
        else:
            row = tl.load(indices + sample * indices_stride)
        return row, row * 0, row == row


@triton.jit
def _in_table(row, steps):
    """Return the row, or 0, and whether the table has it: the host does not read indices on the device."""
    in_table = (row >= 0) & (row < steps)
    return tl.where(in_table, row, 0), in_table


@triton.jit
def _advance_one(cursor, timestep, timestep_count, rows, steps, SHARE: tl.constexpr):
    """Advance the cursor of all samples, and write the timesteps of the next model call."""
    index = tl.load(cursor)
    live = (index < tl.load(cursor + CURSOR_END)) & (index >= 0) & (index < steps)
    following = tl.load(rows + index * NUM_COLUMNS + IN_TIMESTEP, mask=live, other=0.0)
    tl.debug_barrier()  # every thread has read the cursor, which one of them writes
    if live:
        if timestep is not None:
            for first in range(0, timestep_count, SHARE):
                place = first + tl.arange(0, SHARE)
                values = tl.zeros((SHARE,), timestep.dtype.element_ty) + following.to(timestep.dtype.element_ty)
                tl.store(timestep + place, values, mask=place < timestep_count)
        tl.store(cursor, index + 1)


@triton.jit
def _advance_each(cursor, timestep, timestep_count, rows, steps, batch, SHARE: tl.constexpr):
    """Advance a cursor for each sample, and write its timesteps of the next model call."""
    for begin in range(0, batch, SHARE):
        sample = begin + tl.arange(0, SHARE)
        inside = sample < batch
        index = tl.load(cursor + sample * CURSOR_STRIDE, mask=inside, other=0)
        end = tl.load(cursor + sample * CURSOR_STRIDE + CURSOR_END, mask=inside, other=0)
        live = inside & (index < end) & (index >= 0) & (index < steps)
        following = tl.load(rows + index * NUM_COLUMNS + IN_TIMESTEP, mask=live, other=0.0)
        if timestep is not None:
            for first in range(0, timestep_count, batch):
                tl.store(timestep + first + sample, following.to(timestep.dtype.element_ty), mask=live)
        tl.store(cursor + sample * CURSOR_STRIDE, index + 1, mask=live)


@triton.jit
def _advance_stream(state, increment):
    """Advance the offset of torch's stream."""
    offset = tl.load(state + 1) + increment
    tl.debug_barrier()  # every thread has read the offset, which one of them writes
    tl.store(state + 1, offset)


@triton.jit
def _finish(tensors, cursor_stride, timestep_count, steps, batch, increment, draws, SHARE: tl.constexpr):
    """Advance the cursor and torch's stream, in the program that has read them last. See csrc/kernels/cursor.h.

    SHARE: so many places are read and written at once, at least one for each thread.
    """
    _, _, _, _, _, rows, _, _, _, _, _, _, state, cursor, timestep, _, _, _, _, _, _ = tensors
    # Every program counts itself after it has read the cursor and the stream; the one that reads last advances them.
    if cursor is not None:
        tl.debug_barrier()
        if tl.atomic_add(cursor + CURSOR_READERS, 1) == tl.num_programs(0) - 1:
            if cursor_stride == 0:
                _advance_one(cursor, timestep, timestep_count, rows, steps, SHARE)
            else:
                _advance_each(cursor, timestep, timestep_count, rows, steps, batch, SHARE)
            if state is not None and draws:
                _advance_stream(state, increment)
            tl.store(cursor + CURSOR_READERS, 0)
    elif state is not None:
        tl.debug_barrier()
        if tl.atomic_add(state + 2, 1) == tl.num_programs(0) - 1:
            _advance_stream(state, increment)
            tl.store(state + 2, 0)


@triton.jit
def _stream_of(
    state, cursor, rows, index, indices, indices_stride, cursor_stride, steps, seed_low, seed_high, offset_low,
    offset_high, NOISE: tl.constexpr,
):  # fmt: skip
    """Return the seed and offset of torch's stream, and whether it is drawn from."""
    draws = True  # a finished loop and a step without noise draw nothing
    seed = word64(seed_low, seed_high)
    offset = word64(offset_low, offset_high)
    if NOISE == TORCH_STREAM:
        if cursor is not None:
            here, _, going_on = _position_of(0, index, indices, indices_stride, cursor, cursor_stride)
            here, known_row = _in_table(here, steps)
            draws = going_on & known_row & (tl.load(rows + here * NUM_COLUMNS + OUT_NOISE) != 0.0)
        if state is not None:
            seed = tl.load(state).to(tl.uint64, bitcast=True)
            offset = tl.load(state + 1).to(tl.uint64, bitcast=True)
    return seed, offset, draws


# Others than these decide how wide the accesses are; a kernel of their own for 1 or for multiples of 16 gains nothing.
_NOT_SPECIALIZED = ["weights_step_stride", "weights_batch_stride", "indices_stride", "seeds_stride", "index", "steps"]
_NOT_SPECIALIZED += [
    "copies",
    "slots",
    "batch",
    "channels",
    "seed_low",
    "seed_high",
    "offset_low",
    "offset_high",
    "increment",
]
_NOT_SPECIALIZED += ["cursor_stride", "timestep_count"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def step_kernel(
    tensors, strides, size, threads,
    weights_step_stride, weights_batch_stride, indices_stride, seeds_stride, index, steps, copies, slots, batch,
    channels,
    seed_low, seed_high, offset_low, offset_high, increment, cursor_stride, timestep_count,
    NOISE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, COUNTED: tl.constexpr, SHARED: tl.constexpr,
    PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make one step; a program computes a tile of one sample.

    tensors: the fields of StepArguments that are tensors, in its order; None where absent, and a tuple for the
    predictions. Of a DeviceGenerator, philox is seed, offset and programs done; else seed and offset come as words.
    strides: the batch strides of those that have an element for each of the sample's, in the same order.
    COUNTED: elements are counted as they lie in memory, and channels is not read.
    SHARED: the torch stream for tensors larger than torch's grid; a program computes the four tiles, threads elements
    apart, whose values come of the same calls. size and threads are then multiples of BLOCK.
    PTX: for NVIDIA.
    """
    _, _, _, x, _, rows, _, indices, _, _, _, seeds, state, cursor, _, _, _, _, _, _, _ = tensors
    seed, offset, draws = _stream_of(
        state, cursor, rows, index, indices, indices_stride, cursor_stride, steps, seed_low, seed_high, offset_low,
        offset_high, NOISE,
    )  # fmt: skip

    if SHARED:
        tiles = threads // BLOCK
        call = (tl.program_id(0) // tiles).to(tl.int64)
        first_thread = (tl.program_id(0) % tiles) * BLOCK
        thread = (first_thread + tl.arange(0, BLOCK)).to(tl.uint32)
        normals = draw_torch(seed, offset, call.to(tl.uint64), thread)
        for value in tl.static_range(4):
            element = (call * 4 + value) * threads + first_thread
            if element < batch * size:
                sample = element // size
                row, start, live = _position_of(sample, index, indices, indices_stride, cursor, cursor_stride)
                row, in_table = _in_table(row, steps)
                z = normals[value].to(x.dtype.element_ty).to(tl.float32)  # torch.randn rounds float32's
                if live:
                    _step_tile(
                        tensors, strides, (sample, tl.multiple_of(element % size, BLOCK), size, row, in_table),
                        weights_step_stride, weights_batch_stride, copies, slots, batch, z, NOISE, K, True, BLOCK,
                    )  # fmt: skip
    else:
        tiles = (size - 1) // BLOCK + 1  # tl.cdiv adds first, which overflows near 2^31
        sample = (tl.program_id(0) // tiles).to(tl.int64)
        first = (tl.program_id(0) % tiles) * BLOCK
        row, start, live = _position_of(sample, index, indices, indices_stride, cursor, cursor_stride)
        row, in_table = _in_table(row, steps)
        z = tl.zeros((BLOCK,), tl.float32)
        if NOISE == PORTABLE:
            sample_seed = tl.load(seeds + sample * seeds_stride).to(tl.uint64, bitcast=True)
            z = draw_portable(sample_seed, row - start, first, size, channels, COUNTED, BLOCK, PTX)
        if NOISE == TORCH_STREAM:
            counted = counted_place(first + tl.arange(0, BLOCK), channels, size, COUNTED)
            element = (sample * size).to(tl.uint32) + counted.to(tl.uint32)
            z = draw_torch_singly(seed, offset, element, threads).to(x.dtype.element_ty).to(tl.float32)
        if live:
            _step_tile(
                tensors, strides, (sample, first, size, row, in_table),
                weights_step_stride, weights_batch_stride, copies, slots, batch, z, NOISE, K, EVEN, BLOCK,
            )  # fmt: skip

    _finish(tensors, cursor_stride, timestep_count, steps, batch, increment, draws, 128)
