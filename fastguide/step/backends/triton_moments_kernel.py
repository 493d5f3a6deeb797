"""The Triton kernels that make a step's weights: moments of every part of every sample, and the program of a sample.

The first kernel's programs each add up one part of one sample, in float32. The second one has a program of one warp for
each sample, which adds the sample's parts up in float64 and runs the guidance's program (csrc/maths/program.h). These
are two launches, and the step is the third: all threads of a Triton program compute each of its numbers, so the last
one of a sample's parts would make every operation in float64 eight times over, where most GPUs have few units for it.
Bits depend on a sample's own elements and layout: on no batch, and on no order of the launch's programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
MOST_MOMENTS = tl.constexpr(16)
PARTS_AT_ONCE = tl.constexpr(16)


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


_POSITIONS = ["index", "indices_stride", "cursor_stride", "steps", "parts"]


@triton.jit(do_not_specialize=_POSITIONS)
def moments_kernel(
    tensors, strides, size, sums, indices, cursor, index, indices_stride, cursor_stride, parts,
    TERMS: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, EVEN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add up one part of a sample: products of its terms, and the terms themselves, as ``moment_names`` has them.

    tensors: predictions, and the sample behind them if WEIGHS_SAMPLE; strides: of their batches.
    sums: float64 of shape (batch, parts, moments).
    EVEN: a sample is a multiple of PART.
    """
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    _, _, live = _position_of(sample, index, indices, indices_stride, cursor, cursor_stride)
    if live:
        first = first_of(part, PART)
        inside = tl.arange(0, PART) < size - first
        p0 = _term(tensors[0], strides[0], sample, first, inside, EVEN, PART)
        terms = (p0,)
        for k in tl.static_range(1, TERMS):
            t = _term(tensors[k], strides[k], sample, first, inside, EVEN, PART)
            if not (WEIGHS_SAMPLE and k == TERMS - 1):
                t = t - p0
            terms = terms + (t,)  # noqa: RUF005 (Triton has no unpacking)
        to = sums + (sample * parts + part) * (TERMS * (TERMS + 3) // 2)
        for i in tl.static_range(TERMS):
            for j in tl.static_range(i, TERMS):
                tl.store(to, tl.sum(terms[i] * terms[j]).to(tl.float64))
                to += 1
        for k in tl.static_range(TERMS):
            tl.store(to + k, tl.sum(terms[k]).to(tl.float64))


@triton.jit
def _at(values, place, VALUES: tl.constexpr):
    """Return the value at a place, or 0 beyond: the sum of the bits of that one and of zeros."""
    bits = tl.where(tl.arange(0, VALUES) == place, values.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits).to(tl.float64, bitcast=True)


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
def _inputs(sums, sample, parts, size, step, row, MOMENTS: tl.constexpr, VALUES: tl.constexpr):
    """Add the sample's parts up, in order, and return a program's inputs up to its parameters."""
    of_part, moment = tl.arange(0, PARTS_AT_ONCE)[:, None], tl.arange(0, MOST_MOMENTS)[None, :]
    totals = tl.zeros((PARTS_AT_ONCE, MOST_MOMENTS), tl.float64)
    for begin in range(0, parts, PARTS_AT_ONCE):
        inside = (begin + of_part < parts) & (moment < MOMENTS)
        place = sums + (sample * parts + begin + of_part) * MOMENTS + moment
        totals += tl.load(place, mask=inside, other=0.0)
    total = tl.sum(totals, axis=0)
    place = tl.arange(0, VALUES)
    values = tl.zeros((VALUES,), tl.float64)
    for n in tl.static_range(MOMENTS):
        values = tl.where(place == n, _at(total, n, MOST_MOMENTS), values)
    values = tl.where(place == MOMENTS, size.to(tl.float64), values)
    values = tl.where(place == MOMENTS + 1, step.to(tl.float64), values)
    values = tl.where(place == MOMENTS + 2, tl.load(row + X0_SCALE).to(tl.float64), values)
    values = tl.where(place == MOMENTS + 3, tl.load(row + X0_SAMPLE).to(tl.float64), values)
    return tl.where(place == MOMENTS + 4, tl.load(row + X0_PRED).to(tl.float64), values)


_STRIDES = ["weights_step_stride", "weights_batch_stride", "parameters_step_stride", "parameters_batch_stride"]
_STRIDES += ["program_stride", "size", "instructions", "number"]


@triton.jit(do_not_specialize=[*_POSITIONS, *_STRIDES])
def weights_kernel(
    sums, rows, weights, program, parameters, made, read, indices, cursor, index, indices_stride, cursor_stride, steps,
    size, parts, weights_step_stride, weights_batch_stride, program_stride, instructions, parameters_step_stride,
    parameters_batch_stride, number,
    TERMS: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Make a sample's weights of its moments.

    made: the weights as ``StepArguments.made`` has them; read: as the step reads them, where the sample has a weight.
    instructions: the most that the program's memory holds; number: of parameters and constants.
    VALUES: a power of two, at least as many as the program has values.
    """
    sample = tl.program_id(0).to(tl.int64)
    row, start, live = _position_of(sample, index, indices, indices_stride, cursor, cursor_stride)
    row, in_table = _in_table(row, steps)  # the step makes a sample beyond it NaN
    if live:
        moments: tl.constexpr = TERMS * (TERMS + 3) // 2
        predictions: tl.constexpr = TERMS - 1 if WEIGHS_SAMPLE else TERMS
        place, inputs = tl.arange(0, VALUES), moments + 5
        step = tl.where(in_table, row - start, 0)
        values = _inputs(sums, sample, parts, size, step, rows + row * NUM_COLUMNS, moments, VALUES)
        given = parameters + row * parameters_step_stride + sample * parameters_batch_stride + (place - inputs)
        is_given = (place >= inputs) & (place < inputs + number)
        values = tl.where(is_given, tl.load(given, mask=is_given, other=0.0), values)
        words = program + sample * program_stride
        word, following = words + 1 + TERMS, inputs + number
        for n in range(0, tl.minimum(tl.load(words), instructions)):
            a, b, c = (tl.load(word + 1), tl.load(word + 2), tl.load(word + 3))
            a, b, c = (_at(values, a, VALUES), _at(values, b, VALUES), _at(values, c, VALUES))
            values = tl.where(place == following + n, _result_of(tl.load(word), a, b, c), values)
            word += 4
        scale = weights + row * weights_step_stride + sample * weights_batch_stride + predictions
        to = made + sample * (TERMS + 1)
        tl.store(to + predictions, tl.load(scale))
        of_sample = 0.0
        if WEIGHS_SAMPLE:
            read += sample * (TERMS + 1)
            of_sample = _at(values, tl.load(words + TERMS), VALUES).to(tl.float32)
            tl.store(to + TERMS, of_sample)
            tl.store(read + TERMS, tl.load(scale))
            tl.store(read + predictions, of_sample)
        for k in tl.static_range(predictions):
            weight = _at(values, tl.load(words + 1 + k), VALUES).to(tl.float32)
            tl.store(to + k, weight)
            if WEIGHS_SAMPLE:
                tl.store(read + k, weight + of_sample if k == 0 else weight)
