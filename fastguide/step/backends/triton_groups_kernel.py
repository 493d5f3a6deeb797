"""The Triton kernel of a step whose groups of elements, such as tokens, have weights of their own: all in one launch.

A Triton program has some groups of one sample, side by side in the rows of a tile, or a part of one large group after
the other. It adds up the products of their terms, makes the weights of all its groups at once, and makes the step of
their elements, which it has read once where a tile holds a group. Sums, weights and the guided prediction are in
float64: what nearly cancels is divided by its norm.

The kernel is one for all guidances, but not compiled once for all: the words of a guidance's program, which a function
was traced to, are constants. Triton unrolls them, so that each instruction is one of the GPU's, on registers, and what
is the same for all groups is computed once. Nobody keeps values in memory or reads words, as an interpreter does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernel import _NOT_SPECIALIZED as _NOT_SPECIALIZED_IN_STEP
from .triton_kernel import (
    NUM_COLUMNS,
    PORTABLE,
    TORCH_STREAM,
    X0_PRED,
    X0_SAMPLE,
    X0_SCALE,
    _exp,
    _finish,
    _in_table,
    _place_of,
    _position_of,
    _step_guided,
    _stream_of,
)
from .triton_moments_kernel import ADD, DIV, EXP, MAXIMUM, MINIMUM, MUL, SQRT, SUB
from .triton_noise import counted_place, draw_portable, draw_portable_singly, draw_torch_singly


@triton.jit
def _read(pointer, stride, sample, first, elements, inside, EVEN: tl.constexpr):
    """Read some elements; beyond the groups there is 0, which adds nothing."""
    place = _place_of(pointer, stride, sample, first, elements)
    values = tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _terms(
    tensors, strides, sample, first, elements, inside,
    K: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Read some elements of x, and their terms in float64: p_0, the differences p_k - p_0, and x."""
    _, _, _, x, predictions, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _ = tensors
    _, _, _, x_stride, prediction_strides, _, _, _, _, _, _, _, _ = strides
    values = _read(x, x_stride, sample, first, elements, inside, EVEN)  # early: it is there when the weights are
    p0 = _read(predictions[0], prediction_strides[0], sample, first, elements, inside, EVEN).to(tl.float64)
    terms = (p0,)
    for k in tl.static_range(1, K):
        p = _read(predictions[k], prediction_strides[k], sample, first, elements, inside, EVEN).to(tl.float64)
        terms = terms + (p - p0,)  # noqa: RUF005 (Triton has no unpacking)
    if WEIGHS_SAMPLE:
        terms = terms + (values.to(tl.float64),)  # noqa: RUF005
    return values, terms


@triton.jit
def _added(moments, terms, TERMS: tl.constexpr, READ: tl.constexpr):
    """Add the products and sums of a tile's terms to those moments of its groups that the program reads."""
    added = ()
    for i in tl.static_range(TERMS):
        for j in tl.static_range(i, TERMS):
            moment = moments[i * (2 * TERMS - i - 1) // 2 + j]
            if READ[i * (2 * TERMS - i - 1) // 2 + j]:
                moment += tl.sum(terms[i] * terms[j], axis=1)
            added = added + (moment,)  # noqa: RUF005
    for i in tl.static_range(TERMS):
        moment = moments[TERMS * (TERMS + 1) // 2 + i]
        if READ[TERMS * (TERMS + 1) // 2 + i]:
            moment += tl.sum(terms[i], axis=1)
        added = added + (moment,)  # noqa: RUF005
    return added


@triton.jit
def _result(OPERATION: tl.constexpr, a, b, c):
    """Return what an instruction makes of its operands: ``result_of`` of csrc/maths/program.h."""
    if OPERATION == ADD:
        return a + b
    elif OPERATION == SUB:
        return a - b
    elif OPERATION == MUL:
        return a * b
    elif OPERATION == DIV:
        return a / b
    elif OPERATION == SQRT:
        return tl.sqrt(a)
    elif OPERATION == EXP:
        return _exp(a)
    elif OPERATION == MINIMUM:
        return tl.where(a < b, a, tl.where(a == a, b, a))  # NaN if one is
    elif OPERATION == MAXIMUM:
        return tl.where(a > b, a, tl.where(a == a, b, a))
    else:
        return tl.where(a > 0.0, b, c)


@triton.jit
def _result_of(values, WORDS: tl.constexpr, WORD: tl.constexpr):
    """Return what the instruction at a word makes."""
    return _result(WORDS[WORD], values[WORDS[WORD + 1]], values[WORDS[WORD + 2]], values[WORDS[WORD + 3]])


@triton.jit
def _weights(
    moments, numel, step, r, given,
    TERMS: tl.constexpr, NUMBER: tl.constexpr, INSTRUCTIONS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Run the program for all groups at once; return the weights of its terms, each of shape (groups,), in float64."""
    values = moments + (  # noqa: RUF005
        numel.to(tl.float64), step.to(tl.float64), tl.load(r + X0_SCALE).to(tl.float64),
        tl.load(r + X0_SAMPLE).to(tl.float64), tl.load(r + X0_PRED).to(tl.float64),
    )  # fmt: skip
    for k in tl.static_range(NUMBER):
        values = values + (tl.load(given + k),)  # noqa: RUF005
    for n in tl.static_range(INSTRUCTIONS):
        values = values + (_result_of(values, WORDS, 1 + TERMS + 4 * n),)  # noqa: RUF005
    weights = ()
    for k in tl.static_range(TERMS):
        weights = weights + (tl.zeros_like(moments[0]) + values[WORDS[1 + k]],)  # noqa: RUF005
    return weights


@triton.jit
def _write_weights(made, weights, scale, inside, K: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr):
    """Write each group's weights as ``StepArguments.made`` has them."""
    # Where a row of the tile is of several warps (tiles that are read one element at a time), each of them has all
    # weights, and Triton lets all store them at the same place of shared memory, to deal them out to the threads that
    # write here. They do so by one instruction and with the same bits, as each warp has added up the same parts in the
    # same order: it is all the same whose are last. tests/support/ptx shows both, and a barrier ahead of the reads.
    for k in tl.static_range(K):
        tl.store(made + k, weights[k].to(tl.float32), mask=inside)
    tl.store(made + K, tl.load(scale) + tl.zeros_like(weights[0]).to(tl.float32), mask=inside)
    if WEIGHS_SAMPLE:
        tl.store(made + (K + 1), weights[K].to(tl.float32), mask=inside)


@triton.jit
def _combined(terms, weights, TERMS: tl.constexpr):
    """Return the guided prediction, which is rounded once."""
    guided = weights[0][:, None] * terms[0]
    for k in tl.static_range(1, TERMS):
        guided = tl.fma(weights[k][:, None] + tl.zeros_like(terms[k]), terms[k], guided)
    return guided.to(tl.float32)


@triton.jit
def _noise_of(
    x, seeds, seeds_stride, sample, calls, first, elements, size, channels, seed, offset, threads,
    NOISE: tl.constexpr, COUNTED: tl.constexpr, CONTIGUOUS: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw the noise of a tile's elements; zeros where none is drawn here.

    CONTIGUOUS: the elements follow each other, from a multiple of 4 on, so that a call draws four of them.
    """
    z = tl.zeros(elements.shape, tl.float32)
    if NOISE == PORTABLE:
        sample_seed = tl.load(seeds + sample * seeds_stride).to(tl.uint64, bitcast=True)
        if COUNTED and CONTIGUOUS:
            drawn = draw_portable(sample_seed, calls, first, size, channels, COUNTED, BLOCK, PTX)
            z = tl.reshape(drawn, elements.shape)
        else:
            z = draw_portable_singly(sample_seed, calls, first + elements, size, channels, COUNTED, PTX)
    if NOISE == TORCH_STREAM:
        counted = counted_place(first + elements, channels, size, COUNTED)
        element = (sample * size).to(tl.uint32) + counted.to(tl.uint32)
        z = draw_torch_singly(seed, offset, element, threads).to(x.dtype.element_ty).to(tl.float32)
    return z


_NOT_SPECIALIZED = [*_NOT_SPECIALIZED_IN_STEP, "parameters_step_stride", "parameters_batch_stride", "groups", "units"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def grouped_step_kernel(
    tensors, strides, size, threads,
    weights_step_stride, weights_batch_stride, indices_stride, seeds_stride, index, steps, copies, slots, batch,
    channels,
    seed_low, seed_high, offset_low, offset_high, increment, cursor_stride, timestep_count,
    parameters, made, parameters_step_stride, parameters_batch_stride, groups, units,
    NOISE: tl.constexpr, K: tl.constexpr, WEIGHS_SAMPLE: tl.constexpr, COUNTED: tl.constexpr, PTX: tl.constexpr,
    EVEN: tl.constexpr, CONTIGUOUS: tl.constexpr, SINGLE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, NUMBER: tl.constexpr, INSTRUCTIONS: tl.constexpr, READ: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Make one step; a program makes ROWS groups of one sample.

    What has the name of a parameter of ``step_kernel`` is that.
    parameters, made: as ``StepArguments`` has them; NUMBER: of parameters and constants.
    groups: of a sample; units: a group has so many times UNIT elements, which is a power of two.
    EVEN: tiles are full; CONTIGUOUS: their elements follow each other, from multiples of 4 on.
    SINGLE: a tile of (ROWS, WIDTH) holds whole groups; else ROWS is 1, and a group is several tiles.
    READ: which moments the program reads; WORDS: the program, see ``fastguide.guidance.encoded``, the first of which is
    the number of INSTRUCTIONS.
    """
    _, _, _, x, _, rows, weights, indices, _, _, _, seeds, state, cursor, _, _, _, _, _, _, _ = tensors
    seed, offset, draws = _stream_of(
        state, cursor, rows, index, indices, indices_stride, cursor_stride, steps, seed_low, seed_high, offset_low,
        offset_high, NOISE,
    )  # fmt: skip
    chunks = (groups - 1) // ROWS + 1
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first_group = (tl.program_id(0) % chunks) * ROWS
    row, start, live = _position_of(sample, index, indices, indices_stride, cursor, cursor_stride)
    row, in_table = _in_table(row, steps)
    if live:
        terms_of: tl.constexpr = K + 1 if WEIGHS_SAMPLE else K
        numel = units * UNIT
        first = first_group.to(tl.int64) * numel
        group, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        is_there = group < groups - first_group
        elements = group[:, None] * numel + column[None, :]
        inside = is_there[:, None] & (column < numel)[None, :]

        moments = ()
        for _ in tl.static_range(terms_of * (terms_of + 3) // 2):
            moments = moments + (tl.zeros((ROWS,), tl.float64),)  # noqa: RUF005
        if SINGLE:
            values, terms = _terms(tensors, strides, sample, first, elements, inside, K, WEIGHS_SAMPLE, EVEN)
            moments = _added(moments, terms, terms_of, READ)
        else:
            for begin in range(0, numel, WIDTH):
                within = (column < numel - begin)[None, :]
                _x, some = _terms(tensors, strides, sample, first + begin, elements, within, K, WEIGHS_SAMPLE, EVEN)
                moments = _added(moments, some, terms_of, READ)
            tl.debug_barrier()  # every thread has read the group, before one writes it to where it came from

        step = tl.where(in_table, row - start, 0)
        given = parameters + row * parameters_step_stride + sample * parameters_batch_stride
        w = weights + row * weights_step_stride + sample * weights_batch_stride
        of_terms = _weights(
            moments, numel, step, rows + row * NUM_COLUMNS, given, terms_of, NUMBER, INSTRUCTIONS, WORDS
        )  # fmt: skip
        place = made + (sample * groups + first_group + group) * (terms_of + 1)
        _write_weights(place, of_terms, w + K, is_there, K, WEIGHS_SAMPLE)

        if SINGLE:
            guided = _combined(terms, of_terms, terms_of)
            z = _noise_of(
                x, seeds, seeds_stride, sample, row - start, first, elements, size, channels, seed, offset, threads,
                NOISE, COUNTED, CONTIGUOUS, PTX, ROWS * WIDTH,
            )  # fmt: skip
            _step_guided(
                tensors, strides, (sample, first, elements, inside, row, in_table), w, copies, slots, batch, values,
                guided, z, NOISE, K, EVEN,
            )  # fmt: skip
        else:
            for begin in range(0, numel, WIDTH):
                within = (column < numel - begin)[None, :]
                here = first + begin
                values, some = _terms(tensors, strides, sample, here, elements, within, K, WEIGHS_SAMPLE, EVEN)
                guided = _combined(some, of_terms, terms_of)
                z = _noise_of(
                    x, seeds, seeds_stride, sample, row - start, here, elements, size, channels, seed, offset,
                    threads, NOISE, COUNTED, CONTIGUOUS, PTX, WIDTH,
                )  # fmt: skip
                _step_guided(
                    tensors, strides, (sample, here, elements, within, row, in_table), w, copies, slots, batch, values,
                    guided, z, NOISE, K, EVEN,
                )  # fmt: skip
    threads_at_most: tl.constexpr = ROWS * WIDTH // 4
    _finish(tensors, cursor_stride, timestep_count, steps, batch, increment, draws, threads_at_most)
