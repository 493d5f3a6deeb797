"""What float instructions do to a thread: exact where IEEE 754 says so, as a branch may depend on it; else unknown."""

from __future__ import annotations

import ctypes
import math
import struct

from .sass import Instruction, Operand
from .semantics import COMPARE, handles, set_comparison, signed
from .thread import WORD, Thread

SMALLEST_NORMAL = 2.0**-126


def bits_of(value: float) -> int:
    """Return the bits of a float32."""
    return int.from_bytes(struct.pack("<f", value), "little")


def float_of(bits: int) -> float:
    """Return the float32 of these bits."""
    return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


def rounded(value: float) -> float:
    """Round to float32's nearest."""
    return ctypes.c_float(value).value


def sum_rounded_once(a: float, b: float) -> float:
    """Return a + b as float32, rounded once: the sum in double precision is made odd if it is not exact."""
    total = a + b
    if math.isfinite(total):
        part = total - a
        error = (a - (total - part)) + (b - part)
        last_bit = int.from_bytes(struct.pack("<d", total), "little") & 1
        if error != 0 and not last_bit:
            total = math.nextafter(total, math.inf if error > 0 else -math.inf)
    return rounded(total)


def rounded_up(value: int) -> float:
    """Return the least float32 that is no less."""
    nearest = rounded(value)
    return nearest if nearest >= value else float_of(bits_of(nearest) + 1)


def _read(thread: Thread, i: Instruction, operand: Operand) -> float | None:
    bits = thread.read_magnitude(operand)
    if bits is None:
        return None
    value = float_of(bits)
    if "FTZ" in i.modifiers and abs(value) < SMALLEST_NORMAL:
        value = math.copysign(0.0, value)
    if "|" in operand.signs:
        value = abs(value)
    return -value if "-" in operand.signs else value


def _write(thread: Thread, i: Instruction, value: float | None) -> None:
    if value is not None and "FTZ" in i.modifiers and abs(value) < SMALLEST_NORMAL:
        value = math.copysign(0.0, value)
    thread.write(i.operands[0], None if value is None else bits_of(value))


@handles("FADD", "FMUL", "FFMA")
def _arithmetic(thread: Thread, i: Instruction) -> None:
    values = [_read(thread, i, operand) for operand in i.operands[1:]]
    if {"RZ", "RM", "RP", "SAT"} & set(i.modifiers) or None in values:
        _write(thread, i, None)
        return
    known = [value for value in values if value is not None]
    if i.opcode == "FADD":
        _write(thread, i, rounded(known[0] + known[1]))
        return
    product = known[0] * known[1]  # exact in double precision
    _write(thread, i, rounded(product) if i.opcode == "FMUL" else sum_rounded_once(product, known[2]))


@handles("FSETP")
def _compare(thread: Thread, i: Instruction) -> None:
    _, _, first, second, given = i.operands
    a, b, name = _read(thread, i, first), _read(thread, i, second), i.modifiers[0]
    result: bool | None = None
    if a is not None and b is not None:
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("NAN", "NUM"):
            result = unordered == (name == "NAN")
        else:
            result = name.endswith("U") if unordered else COMPARE[name.removesuffix("U")](a, b)
    set_comparison(thread, i, result, thread.predicate(given))


@handles("FSEL", "FMNMX")
def _select(thread: Thread, i: Instruction) -> None:
    _, first, second, condition = i.operands
    a, b, chosen = _read(thread, i, first), _read(thread, i, second), thread.predicate(condition)
    if chosen is None:
        _write(thread, i, None)
    elif i.opcode == "FSEL":
        _write(thread, i, a if chosen else b)
    elif a is None or b is None or math.isnan(a) or math.isnan(b):
        _write(thread, i, None)
    else:
        _write(thread, i, min(a, b) if chosen else max(a, b))


# ---- Conversions, as divisions of integers and uniform values need them ----


@handles("I2F", "I2FP", "UI2F")
def _from_integer(thread: Thread, i: Instruction) -> None:
    source = i.operands[1]
    wide = {"U64", "S64"} & set(i.modifiers)
    value = thread.read_wide(source) if wide else thread.read(source)
    if value is not None and {"S32", "S64"} & set(i.modifiers):
        value = signed(value, 64 if wide else 32)
    if value is None or "F64" in i.modifiers:
        thread.write(i.operands[0], None)
    else:
        thread.write(i.operands[0], bits_of(rounded_up(value) if "RP" in i.modifiers else _nearest(value)))


def _nearest(value: int) -> float:
    """Round an integer to float32 once: 53 bits of it are exact, and the others are one odd bit."""
    extra = max(value.bit_length() - 53, 0) if value >= 0 else max((-value).bit_length() - 53, 0)
    kept = value >> extra
    return rounded(float((kept | (kept << extra != value)) << extra))


@handles("F2I")
def _to_integer(thread: Thread, i: Instruction) -> None:
    destination, source = i.operands
    wide = {"U64", "S64"} & set(i.modifiers)
    value = None if "F64" in i.modifiers else _read(thread, i, source)
    if "F64" in i.modifiers:
        thread.read_wide(source)
    result = None
    if value is not None and math.isfinite(value) and "TRUNC" in i.modifiers and not {"S32", "S64"} & set(i.modifiers):
        result = min(max(int(value), 0), (1 << (64 if wide else 32)) - 1)
    (thread.write_wide if wide else thread.write)(destination, result)


@handles("MUFU")
def _approximate(thread: Thread, i: Instruction) -> None:
    """Know only the reciprocal: divisions of integers correct its last bits, whatever these are."""
    value = _read(thread, i, i.operands[1])
    if value is None or i.modifiers[0] != "RCP" or math.isnan(value) or value == 0:
        thread.write(i.operands[0], None)
    else:
        thread.write(i.operands[0], bits_of(rounded(1 / value)))


@handles("HFMA2", "HADD2")
def _halves(thread: Thread, i: Instruction) -> None:
    """Know only -0 * 0 + constants, by which the compiler writes a number in the pipe that is free."""
    destination, a, b, *constants = i.operands
    zero = all(operand.kind == "R" and operand.value == -1 for operand in (a, b))
    if i.opcode == "HFMA2" and zero and len(constants) == 2 and all(c.kind == "float" for c in constants):
        high, low = (int.from_bytes(struct.pack("<e", c.number), "little") for c in constants)
        thread.write(destination, (high << 16 | low) & WORD)
    else:
        _unknown(thread, i)


@handles("F2FP", "HMUL2", "HMNMX2", "FCHK", "FRND")
def _unknown(thread: Thread, i: Instruction) -> None:
    for operand in i.operands[1:]:
        if operand.kind in ("R", "UR"):
            thread.read_bits(operand)
    thread.write(i.operands[0], None)


@handles("F2F", "DADD", "DMUL", "DFMA")
def _unknown_double(thread: Thread, i: Instruction) -> None:
    wide = i.opcode != "F2F" or i.modifiers[0] == "F64"
    for operand in i.operands[1:]:
        if operand.kind in ("R", "UR"):
            (thread.read_wide if i.opcode != "F2F" or i.modifiers[-1] == "F64" else thread.read)(operand)
    (thread.write_wide if wide else thread.write)(i.operands[0], None)
