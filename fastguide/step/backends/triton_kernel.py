"""The Triton kernel: the guided step of csrc/maths/step.h over tiles of a sample. Imported at the first step."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...solvers.table import ROW_COLUMNS
from ..cursor import CURSOR_COLUMNS
from ..noise import SOURCES

# Triton runs this file in its interpreter, on the CPU: it has no libdevice.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

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

CURSOR_END = tl.constexpr(CURSOR_COLUMNS.index("end"))
CURSOR_FIRST = tl.constexpr(CURSOR_COLUMNS.index("first"))
CURSOR_READERS = tl.constexpr(CURSOR_COLUMNS.index("readers"))
CURSOR_STRIDE = tl.constexpr(len(CURSOR_COLUMNS))

NONE = tl.constexpr(SOURCES.index("none"))
GIVEN = tl.constexpr(SOURCES.index("given"))
TORCH_STREAM = tl.constexpr(SOURCES.index("torch_stream"))
PORTABLE = tl.constexpr(SOURCES.index("portable"))


@triton.jit
def _add(a, b, PTX: tl.constexpr):
    """Add with a rounding of its own: ptxas up to 13.0 joins products and sums that LLVM packed in pairs."""
    if PTX:
        return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    else:
        return a + b


@triton.jit
def _exp(x):
    """Compute exp to 1 or 2 units in the last place; tl.exp is the hardware's approximation."""
    return tl.exp(x) if _INTERPRETED else libdevice.exp(x)


@triton.jit
def _torch_normals(a, b):
    """Apply curand's Box-Muller, sine first; see torch_normal in csrc/maths/philox.h."""
    u = tl.fma(a.to(tl.float32), 2.3283064e-10, 1.1641532e-10)
    v = tl.fma(b.to(tl.float32), 1.4629181e-09, 7.3145904e-10)  # 2^-32 of a turn, and half of that
    if _INTERPRETED:
        radius = tl.sqrt_rn(-2.0 * tl.log(u))
        sine, cosine = tl.sin(v), tl.cos(v)
    else:
        radius = tl.sqrt_rn(-2.0 * libdevice.log(u))
        sine, cosine = libdevice.fast_sinf(v), libdevice.fast_cosf(v)
    return sine * radius, cosine * radius


@triton.jit
def _portable_normals(a, b, PTX: tl.constexpr):
    """Compute portable_normal of csrc/maths/philox.h: the same bits, as nothing is contracted."""
    u = _add(a.to(tl.float32) * 2.3283064e-10, 1.1641532e-10, PTX)
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = _add(((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True), -1.0, PTX)
    p = _add(f * 0.20164758, -0.32361004, PTX)
    p = _add(p * f, 0.34486449, PTX)
    p = _add(p * f, -0.39813766, PTX)
    p = _add(p * f, 0.49942458, PTX)
    p = _add(p * f, -0.66669428, PTX)
    p = _add(p * f, 1.0000064, PTX)
    radius = tl.sqrt_rn(_add(exponent * -1.3862944, _add(f * -2.0, f * f * p, PTX), PTX))
    quarter = ((b + 0x20000000) >> 30).to(tl.int32)
    y = (b.to(tl.int32, bitcast=True) - (quarter << 30)).to(tl.float32) * 1.8626451e-09
    y2 = y * y
    sine = _add(y2 * -3.5950452e-05, 0.0024900010, PTX)
    sine = _add(sine * y2, -0.080745436, PTX)
    sine = _add(sine * y2, 0.78539819, PTX) * y
    cosine = _add(y2 * -0.00031902004, 0.015850201, PTX)
    cosine = _add(cosine * y2, -0.30842441, PTX)
    cosine = _add(cosine * y2, 1.0, PTX)
    odd = (quarter & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def _counted(place, channels, size, COUNTED: tl.constexpr):
    """Return an element's place in a contiguous sample; see StepArguments::channels in csrc/kernels/arguments.h."""
    if COUNTED:
        return place
    return (place % channels) * (size // channels) + place // channels


@triton.jit
def _word64(low, high):
    """Return 64 bits of two words that came as int32."""
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _draw_portable(
    seed, step, first, size, channels, COUNTED: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Draw the values of a tile that begins at the element `first` of its sample."""
    step = step.to(tl.uint32)
    zero = step * 0
    if COUNTED:
        call = first // 4 + tl.arange(0, BLOCK // 4)
        words = tl.philox(seed, call.to(tl.uint32), (call.to(tl.int64) >> 32).to(tl.uint32), step, zero, n_rounds=10)
        z0, z1 = _portable_normals(words[0], words[1], PTX)
        z2, z3 = _portable_normals(words[2], words[3], PTX)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    element = _counted(first + tl.arange(0, BLOCK), channels, size, COUNTED)
    call = element // 4
    words = tl.philox(seed, call.to(tl.uint32), (call.to(tl.int64) >> 32).to(tl.uint32), step, zero, n_rounds=10)
    low = element % 4 < 2
    z0, z1 = _portable_normals(tl.where(low, words[0], words[2]), tl.where(low, words[1], words[3]), PTX)
    return tl.where(element % 2 == 0, z0, z1)


@triton.jit
def _torch_call(seed, offset, call, thread):
    """Return the four words of one call in one thread of torch's kernel."""
    counter = (offset >> 2) + call
    zero = thread * 0
    return tl.philox(
        seed, zero + counter.to(tl.uint32), zero + (counter >> 32).to(tl.uint32), thread, zero, n_rounds=10
    )


@triton.jit
def _draw_torch(seed, offset, call, thread):
    """Return the four values that torch makes of such a call."""
    words = _torch_call(seed, offset, call, thread)
    z0, z1 = _torch_normals(words[0], words[1])
    z2, z3 = _torch_normals(words[2], words[3])
    return z0, z1, z2, z3


@triton.jit
def _draw_torch_singly(seed, offset, element, threads):
    """Return the value that torch makes for each element, counted as it lies in memory: one of its call's four."""
    dealt = element // threads.to(tl.uint32)
    words = _torch_call(seed, offset, (dealt // 4).to(tl.uint64), element % threads.to(tl.uint32))
    low = dealt % 4 < 2
    z0, z1 = _torch_normals(tl.where(low, words[0], words[2]), tl.where(low, words[1], words[3]))
    return tl.where(dealt % 2 == 0, z0, z1)


@triton.jit
def _place(pointer, stride, sample, first, BLOCK: tl.constexpr):
    return pointer + sample.to(tl.int64) * stride + first + tl.arange(0, BLOCK)


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
def _inpainted(row, result, painted, known, noise, PTX: tl.constexpr):
    """Put the known image, noised to the level of the next sample, where the mask is 0."""
    level = _add(tl.load(row + KNOWN_SAMPLE) * known, tl.load(row + KNOWN_NOISE) * noise, PTX)
    blended = _add(painted * result, (1.0 - painted) * level, PTX)
    return tl.where(painted == 1.0, result, tl.where(painted == 0.0, level, blended))


@triton.jit
def _guided(
    predictions, strides, w, sample, first, inside,
    K: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combine the predictions: m = sum_k w_k p_k, anchored at p_0; column 0 of the weights holds the sum of all w_k."""
    guided = tl.zeros((BLOCK,), tl.float32)
    if K > 0:
        p0 = _load(_place(predictions[0], strides[0], sample, first, BLOCK), inside, EVEN)
        guided = tl.load(w) * p0
        for k in tl.static_range(1, K):
            p = _load(_place(predictions[k], strides[k], sample, first, BLOCK), inside, EVEN)
            guided = _add(guided, tl.load(w + k) * (p - p0), PTX)
    return guided


@triton.jit
def _next_sample(r, values, guided, x0, g, v, z, NOISE: tl.constexpr, PTX: tl.constexpr):
    """Move from x_0 to the next sample; g is the scaled gradient, v the learned variance: None if there is none."""
    result = _add(tl.load(r + OUT_X0) * x0, tl.load(r + OUT_SAMPLE) * values, PTX)
    out_pred = tl.load(r + OUT_PRED)
    result = _add(result, tl.where(out_pred != 0.0, out_pred * guided, 0.0), PTX)  # guided may have overflowed
    shift, deviation = tl.load(r + OUT_GRAD), tl.load(r + OUT_NOISE)
    if v is not None:
        log_variance = _add(tl.load(r + LOGVAR_BASE), tl.load(r + LOGVAR_SPAN) * v, PTX)
        if g is not None:
            var_grad = tl.load(r + OUT_VAR_GRAD)
            by_variance = tl.where(var_grad != 0.0, var_grad * _exp(log_variance), 0.0)
            result = _add(result, _add(shift, by_variance, PTX) * g, PTX)
        if NOISE != NONE:
            shaken = deviation * _exp(0.5 * log_variance) * z
            result = _add(result, tl.where(deviation != 0.0, shaken, 0.0), PTX)  # the variance may be anything else
    else:
        if g is not None:
            result = _add(result, shift * g, PTX)
        if NOISE != NONE:
            result = _add(result, deviation * z, PTX)
    return result


@triton.jit
def _step_tile(
    tensors, strides, place, weights_step_stride, weights_batch_stride, copies, batch, z,
    NOISE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the elements first .. first + BLOCK of a sample as csrc/maths/step.h does; z is noise drawn here."""
    (
        out, original, staged, x, predictions, rows, weights, _, gradient, variance, noise, _, _, _, _,
        mask, known, known_noise,
    ) = tensors  # fmt: skip
    (
        out_stride, original_stride, staged_stride, x_stride, prediction_strides, gradient_stride, variance_stride,
        noise_stride, mask_stride, known_stride, known_noise_stride,
    ) = strides  # fmt: skip
    sample, first, size, row, in_table = place
    inside = tl.arange(0, BLOCK) < size - first
    values = _load(_place(x, x_stride, sample, first, BLOCK), inside, EVEN)
    w = weights + row * weights_step_stride + sample * weights_batch_stride
    guided = _guided(predictions, prediction_strides, w, sample, first, inside, K, EVEN, PTX, BLOCK)
    if NOISE == GIVEN:
        z = _load(_place(noise, noise_stride, sample, first, BLOCK), inside, EVEN)

    r = rows + row * NUM_COLUMNS
    x0 = _add(tl.load(r + X0_SAMPLE) * values, tl.load(r + X0_PRED) * guided, PTX)
    g = None
    if gradient is not None:
        scale = tl.load(w + (K if K > 0 else 1))
        g = scale * _load(_place(gradient, gradient_stride, sample, first, BLOCK), inside, EVEN)
        x0 = _add(x0, tl.load(r + X0_GRAD) * g, PTX)
    x0 *= tl.load(r + X0_SCALE)  # after the cancellation of sample and prediction, not before
    clip = tl.load(r + CLIP)
    x0 = tl.where(-clip > x0, -clip, x0)  # comparisons in this order let NaN through
    x0 = tl.where(clip < x0, clip, x0)

    v = None
    if variance is not None:
        v = _load(_place(variance, variance_stride, sample, first, BLOCK), inside, EVEN)
    result = _next_sample(r, values, guided, x0, g, v, z, NOISE, PTX)
    if mask is not None:
        k = _load(_place(known, known_stride, sample, first, BLOCK), inside, EVEN)
        zk = _load(_place(known_noise, known_noise_stride, sample, first, BLOCK), inside, EVEN)
        painted = _load(_place(mask, mask_stride, sample, first, BLOCK), inside, EVEN)
        result = _inpainted(r, result, painted, k, zk, PTX)
    result = tl.where(in_table, result, float("nan"))
    _store(_place(out, out_stride, sample, first, BLOCK), result, inside, EVEN)
    if original is not None:
        x0 = tl.where(in_table, x0, float("nan"))
        _store(_place(original, original_stride, sample, first, BLOCK), x0, inside, EVEN)
    if staged is not None:
        result *= tl.load(r + IN_SCALE)
        for k in range(copies):
            _store(_place(staged, staged_stride, k * batch + sample, first, BLOCK), result, inside, EVEN)


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
def _advance(cursor, cursor_stride, timestep, timestep_count, rows, steps, batch, SHARE: tl.constexpr):
    """Advance the cursors and write the timesteps of the next model call, as csrc/kernels/cursor.h does."""
    cursors = batch
    if cursor_stride == 0:
        cursors = 1
    for begin in range(0, cursors, SHARE):
        sample = begin + tl.arange(0, SHARE)
        inside = sample < cursors
        index = tl.load(cursor + sample * CURSOR_STRIDE, mask=inside, other=0)
        end = tl.load(cursor + sample * CURSOR_STRIDE + CURSOR_END, mask=inside, other=0)
        live = inside & (index < end) & (index >= 0) & (index < steps)
        following = tl.load(rows + index * NUM_COLUMNS + IN_TIMESTEP, mask=live, other=0.0)
        if timestep is not None:
            for first in range(0, timestep_count, cursors):
                tl.store(timestep + first + sample, following.to(timestep.dtype.element_ty), mask=live)
        tl.store(cursor + sample * CURSOR_STRIDE, index + 1, mask=live)


@triton.jit
def _finish(tensors, cursor_stride, timestep_count, steps, batch, increment, draws):
    """Advance the cursor and torch's stream, in the program that has read them last."""
    _, _, _, _, _, rows, _, _, _, _, _, _, state, cursor, timestep, _, _, _ = tensors
    # Every program counts itself after it has read the cursor and the stream; the one that reads last advances them.
    if cursor is not None:
        tl.debug_barrier()
        if tl.atomic_add(cursor + CURSOR_READERS, 1) == tl.num_programs(0) - 1:
            _advance(cursor, cursor_stride, timestep, timestep_count, rows, steps, batch, 128)
            if state is not None and draws:
                tl.store(state + 1, tl.load(state + 1) + increment)
            tl.store(cursor + CURSOR_READERS, 0)
    elif state is not None:
        tl.debug_barrier()
        if tl.atomic_add(state + 2, 1) == tl.num_programs(0) - 1:
            tl.store(state + 1, tl.load(state + 1) + increment)
            tl.store(state + 2, 0)


# Others than these decide how wide the accesses are; a kernel of their own for 1 or for multiples of 16 gains nothing.
_NOT_SPECIALIZED = ["weights_step_stride", "weights_batch_stride", "indices_stride", "seeds_stride", "index", "steps"]
_NOT_SPECIALIZED += ["copies", "batch", "channels", "seed_low", "seed_high", "offset_low", "offset_high", "increment"]
_NOT_SPECIALIZED += ["cursor_stride", "timestep_count"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def step_kernel(
    tensors, strides, size, threads,
    weights_step_stride, weights_batch_stride, indices_stride, seeds_stride, index, steps, copies, batch, channels,
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
    _, _, _, x, _, rows, _, indices, _, _, _, seeds, state, cursor, _, _, _, _ = tensors
    draws = True  # from torch's stream; a finished loop and a step without noise draw nothing
    if NOISE == TORCH_STREAM:
        if cursor is not None:
            here, start, going_on = _position_of(0, index, indices, indices_stride, cursor, cursor_stride)
            here, known_row = _in_table(here, steps)
            draws = going_on & known_row & (tl.load(rows + here * NUM_COLUMNS + OUT_NOISE) != 0.0)
        if state is None:
            seed = _word64(seed_low, seed_high)
            offset = _word64(offset_low, offset_high)
        else:
            seed = tl.load(state).to(tl.uint64, bitcast=True)
            offset = tl.load(state + 1).to(tl.uint64, bitcast=True)

    if SHARED:
        tiles = threads // BLOCK
        call = (tl.program_id(0) // tiles).to(tl.int64)
        first_thread = (tl.program_id(0) % tiles) * BLOCK
        thread = (first_thread + tl.arange(0, BLOCK)).to(tl.uint32)
        normals = _draw_torch(seed, offset, call.to(tl.uint64), thread)
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
                        weights_step_stride, weights_batch_stride, copies, batch, z, NOISE, K, True, PTX, BLOCK,
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
            z = _draw_portable(sample_seed, row - start, first, size, channels, COUNTED, BLOCK, PTX)
        if NOISE == TORCH_STREAM:
            counted = _counted(first + tl.arange(0, BLOCK), channels, size, COUNTED)
            element = (sample * size).to(tl.uint32) + counted.to(tl.uint32)
            z = _draw_torch_singly(seed, offset, element, threads).to(x.dtype.element_ty).to(tl.float32)
        if live:
            _step_tile(
                tensors, strides, (sample, first, size, row, in_table),
                weights_step_stride, weights_batch_stride, copies, batch, z, NOISE, K, EVEN, PTX, BLOCK,
            )  # fmt: skip

    _finish(tensors, cursor_stride, timestep_count, steps, batch, increment, draws)
