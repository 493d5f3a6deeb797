"""The Triton kernel that makes a step's weights: moments of every part of every sample, and the program of a sample.

A Triton program adds up one part of one sample, in float32. The last one of a sample, by a count, adds the sample's
parts up in float64 and runs the guidance's program, see csrc/maths/program.h. So bits depend on a sample's own elements
and layout: on no batch, and on no order of the launch's programs.

Every warp of that last one runs the guidance's program, each by itself: a tile has as many values as a warp has lanes,
so that all warps have it, and an operand comes from another lane without memory or a barrier in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...guidance.encoded import OTHER_INPUTS
from ...guidance.symbols import OPERATIONS
from .triton_kernel import NUM_COLUMNS, X0_PRED, X0_SAMPLE, X0_SCALE, _exp, _in_table, _place, _position_of

_NAMES = tuple(OPERATIONS)
ADD = tl.constexpr(_NAMES.index("add"))
SUB = tl.constexpr(_NAMES.index("sub"))
MUL = tl.constexpr(_NAMES.index("mul"))
DIV = tl.constexpr(_NAMES.index("div"))
SQRT = tl.constexpr(_NAMES.index("sqrt"))
EXP = tl.constexpr(_NAMES.index("exp"))
MINIMUM = tl.constexpr(_NAMES.index("minimum"))
MAXIMUM = tl.constexpr(_NAMES.index("maximum"))
OTHERS = tl.constexpr(len(OTHER_INPUTS))
PARTS_AT_ONCE = tl.constexpr(16)
LOADS_AT_ONCE = tl.constexpr(4)
LANES = tl.constexpr(32)  # a warp of AMD's has 64, and each value twice


@triton.jit
def _term(pointers, stride, sample, first, inside, EVEN: tl.constexpr, PART: tl.constexpr):
    """Read a part of a tensor; beyond the sample's end there is 0, which adds nothing."""
    place = _place(pointers, stride, sample, first, PART)
    values = tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def first_of(part, PART: tl.constexpr):
    """Return a part's first element, in 64 bits: a sample may have more than 2^31."""
    return part.to(tl.int64) * PART


@triton.jit
def _moments_of_part(
    tensors, strides, size, sample, part,
    TERMS: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, EVEN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add up one part of a sample: products of its terms, and the terms themselves, as ``moment_names`` has them."""
    first = first_of(part, PART)
    inside = tl.arange(0, PART) < size - first
    p0 = _term(tensors[0], strides[0], sample, first, inside, EVEN, PART)
    terms = (p0,)
    for k in tl.static_range(1, TERMS):
        t = _term(tensors[k], strides[k], sample, first, inside, EVEN, PART)
        if not (WEIGHS_SAMPLE and k == TERMS - 1):
            t = t - p0
        terms = terms + (t,)  # noqa: RUF005 (Triton has no unpacking)
    lane = tl.arange(0, LANES)
    moments = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(TERMS):
        for j in tl.static_range(i, TERMS):
            moments = tl.where(lane == i * (2 * TERMS - i - 1) // 2 + j, tl.sum(terms[i] * terms[j]), moments)
    for k in tl.static_range(TERMS):
        moments = tl.where(lane == TERMS * (TERMS + 1) // 2 + k, tl.sum(terms[k]), moments)
    return moments.to(tl.float64)


@triton.jit
def _is_last_of_sample(counter, parts):
    """Count a part; return whether it is the last one, for which all that the others have written is there."""
    tl.debug_barrier()  # what all threads have written comes before the count
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def _total(sums, parts, MOMENTS: tl.constexpr):
    """Add a sample's parts up, in an order that depends on their number alone."""
    of_part, moment = tl.arange(0, PARTS_AT_ONCE)[:, None], tl.arange(0, LANES)[None, :]
    totals = tl.zeros((PARTS_AT_ONCE, LANES), tl.float64)
    for begin in range(0, parts, PARTS_AT_ONCE * LOADS_AT_ONCE):
        loaded = ()
        for k in tl.static_range(LOADS_AT_ONCE):
            part = begin + PARTS_AT_ONCE * k + of_part
            inside = (part < parts) & (moment < MOMENTS)
            loaded = loaded + (tl.load(sums + part * MOMENTS + moment, mask=inside, other=0.0),)  # noqa: RUF005
        for k in tl.static_range(LOADS_AT_ONCE):
            totals += loaded[k]
    return tl.sum(totals, axis=0)


@triton.jit
def _inputs(sums, parts, size, step, row, given, number, MOMENTS: tl.constexpr, TILES: tl.constexpr):
    """Return a program's inputs at their places among its values, which are in tiles; the others are 0."""
    lane = tl.arange(0, LANES)
    inputs = ()
    for k in tl.static_range(TILES):
        place = lane + (LANES * k - MOMENTS - OTHERS)
        inputs = inputs + (tl.load(given + place, mask=(place >= 0) & (place < number), other=0.0),)  # noqa: RUF005
    x0_scale, x0_sample, x0_pred = tl.load(row + X0_SCALE), tl.load(row + X0_SAMPLE), tl.load(row + X0_PRED)
    first = tl.where(lane < MOMENTS, _total(sums, parts, MOMENTS), inputs[0])
    first = tl.where(lane == MOMENTS, size, first)
    first = tl.where(lane == MOMENTS + 1, step, first)
    first = tl.where(lane == MOMENTS + 2, x0_scale, first)
    first = tl.where(lane == MOMENTS + 3, x0_sample, first)
    values = (tl.where(lane == MOMENTS + 4, x0_pred, first),)
    for k in tl.static_range(1, TILES):
        values = values + (inputs[k],)  # noqa: RUF005
    return values


@triton.jit
def _at(values, place, TILES: tl.constexpr):
    """Return the value at a place in all lanes, or 0 beyond."""
    lane = tl.arange(0, LANES)
    tile = tl.where(place >> 5 == 0, values[0], 0.0)
    for k in tl.static_range(1, TILES):
        tile = tl.where(place >> 5 == k, values[k], tile)
    return tl.gather(tile, lane * 0 + (place & 31), 0)


@triton.jit
def _result_of(operation, a, b, c):
    """Return what an instruction makes of its operands: ``result_of`` of csrc/maths/program.h."""
    result = tl.where(a > 0.0, b, c)
    if operation == ADD:
        result = a + b
    elif operation == SUB:
        result = a - b
    elif operation == MUL:
        result = a * b
    elif operation == DIV:
        result = a / b
    elif operation == SQRT:
        result = tl.sqrt(a)
    elif operation == EXP:
        result = _exp(a)
    elif operation == MINIMUM:
        result = tl.where((a < b) | (a != a), a, b)  # NaN if one is
    elif operation == MAXIMUM:
        result = tl.where((a > b) | (a != a), a, b)
    return result


@triton.jit
def _instruction(word, there):
    """Read an instruction: its operation, and the places of its operands."""
    return (
        tl.load(word, mask=there, other=0), tl.load(word + 1, mask=there, other=0),
        tl.load(word + 2, mask=there, other=0), tl.load(word + 3, mask=there, other=0),
    )  # fmt: skip


@triton.jit
def _run(values, word, count, following, TILES: tl.constexpr):
    """Run a program's instructions, the first of which is at ``word``, and writes the value at ``following``."""
    lane = tl.arange(0, LANES)
    operation, a, b, c = _instruction(word, count > 0)
    for n in range(0, count):
        word += 4
        coming = _instruction(word, n + 1 < count)  # takes as long as computing does
        result = _result_of(operation, _at(values, a, TILES), _at(values, b, TILES), _at(values, c, TILES))
        changed = ()
        for k in tl.static_range(TILES):
            changed = changed + (tl.where(lane + LANES * k == following + n, result, values[k]),)  # noqa: RUF005
        values = changed
        operation, a, b, c = coming
    return values


@triton.jit
def _write_weights(
    made, read, words, values, scale, TERMS: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, TILES: tl.constexpr
):
    """Write a sample's weights as ``StepArguments.made`` has them; and as the step reads them, where x has a weight."""
    lane = tl.arange(0, LANES)
    predictions: tl.constexpr = TERMS - 1 if WEIGHS_SAMPLE else TERMS
    weights = tl.zeros((LANES,), tl.float32) + tl.load(scale)
    for k in tl.static_range(predictions):
        weights = tl.where(lane == k, _at(values, tl.load(words + 1 + k), TILES).to(tl.float32), weights)
    if WEIGHS_SAMPLE:
        of_sample = _at(values, tl.load(words + TERMS), TILES).to(tl.float32)
        as_read = tl.where(lane == 0, weights + of_sample, tl.where(lane == predictions, of_sample, weights))
        tl.store(read + lane, as_read, mask=lane <= TERMS)
        weights = tl.where(lane == TERMS, of_sample, weights)
    tl.store(made + lane, weights, mask=lane <= TERMS)


_NOT_SPECIALIZED = ["index", "indices_stride", "cursor_stride", "steps", "parts", "instructions", "number"]
_NOT_SPECIALIZED += ["weights_step_stride", "weights_batch_stride", "program_stride"]
_NOT_SPECIALIZED += ["parameters_step_stride", "parameters_batch_stride"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def moments_kernel(
    tensors, strides, size, scratch, rows, weights, program, parameters, made, indices, cursor,
    index, indices_stride, cursor_stride, steps, parts, weights_step_stride, weights_batch_stride, program_stride,
    instructions, parameters_step_stride, parameters_batch_stride, number,
    TERMS: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, EVEN: tl.constexpr, PART: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add up one part of a sample; in its last part, make the sample's weights.

    tensors: predictions, and the sample behind them if WEIGHS_SAMPLE; strides: of their batches.
    scratch: as csrc/kernels/gpu/moments.h has it: sums of (batch, parts, moments), a counter of 8 bytes for each
    sample, and the weights as the step reads them.
    instructions: the most that the program's memory holds; number: of parameters and constants.
    EVEN: a sample is a multiple of PART.
    TILES: so many tiles of LANES hold a program's values.
    """
    moments: tl.constexpr = TERMS * (TERMS + 3) // 2
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    row, start, live = _position_of(sample, index, indices, indices_stride, cursor, cursor_stride)
    if live:
        lane = tl.arange(0, LANES)
        of_part = _moments_of_part(tensors, strides, size, sample, part, TERMS, WEIGHS_SAMPLE, EVEN, PART)
        sums = scratch + sample * parts * moments
        tl.store(sums + part * moments + lane, of_part, mask=lane < moments)
        counters = scratch + tl.num_programs(0).to(tl.int64) * moments
        counter = (counters + sample).to(tl.pointer_type(tl.int32))
        if _is_last_of_sample(counter, parts):
            tl.store(counter, 0)  # for the next launch
            row, in_table = _in_table(row, steps)  # the step makes a sample beyond it NaN
            step = tl.where(in_table, row - start, 0)
            given = parameters + row * parameters_step_stride + sample * parameters_batch_stride
            values = _inputs(
                sums, parts, size, step, rows + row * NUM_COLUMNS, given, number, moments, TILES
            )  # fmt: skip
            words = program + sample * program_stride
            count = tl.minimum(tl.load(words), instructions)
            values = _run(values, words + 1 + TERMS, count, number + (moments + OTHERS), TILES)
            predictions: tl.constexpr = TERMS - 1 if WEIGHS_SAMPLE else TERMS
            scale = weights + row * weights_step_stride + sample * weights_batch_stride + predictions
            read = (counters + tl.num_programs(0) // parts).to(tl.pointer_type(tl.float32))
            place = sample * (TERMS + 1)
            _write_weights(made + place, read + place, words, values, scale, TERMS, WEIGHS_SAMPLE, TILES)
