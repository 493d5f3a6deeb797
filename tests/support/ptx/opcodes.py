"""Writes Python for the opcodes that compute: one function for each kind of instruction, in a table by their roots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.support.ptx import arithmetic
from tests.support.ptx.operands import Writer
from tests.support.ptx.parse import DTYPES

Handler = Callable[[Writer], list[str]]
"""Writes an instruction's lines of Python."""

SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


def _add_or_subtract(w: Writer) -> list[str]:
    w.only(*["rn"] * w.is_float)
    return w.write(f"{w.read(1)} {SIGNS[w.instruction.root]} {w.read(2)}")


def _multiply(w: Writer) -> list[str]:
    if w.is_float:
        return _add_or_subtract(w)
    return _multiply_integers(w)


def _multiply_integers(w: Writer) -> list[str]:
    """``mul`` and ``mad``: the lower or the upper half of the product, or all of it."""
    if len(w.modifiers) != 2 or w.modifiers[0] not in ("lo", "hi", "wide"):
        raise w.unknown()
    part, dtype = w.modifiers[0], w.dtype
    if part == "wide":
        if dtype not in arithmetic.WIDER:
            raise w.unknown()
        dtype = arithmetic.WIDER[dtype]
        a, b = (f"np.asarray({w.read(k)}).astype({w.constant(dtype)})" for k in (1, 2))
        value = f"{a} * {b}"
    elif part == "hi":
        value = w.call(arithmetic.product_high, w.read(1), w.read(2), w.constant(dtype))
    else:
        value = f"{w.read(1)} * {w.read(2)}"
    return w.write(f"{value} + {w.read(3, dtype)}" if w.instruction.root == "mad" else value, dtype)


def _fused(w: Writer) -> list[str]:
    mode = w.modifiers[0]
    if w.modifiers == ["rn", "f64"]:
        return w.write(w.call(arithmetic.fma_of_doubles, *[w.read(k) for k in (1, 2, 3)]))
    if mode not in ("rn", "rm", "rp", "rz") or w.modifiers[1:] not in (["f32"], ["ftz", "f32"]):
        raise w.unknown()
    operands = [w.read(k) for k in (1, 2, 3)]
    if "ftz" not in w.modifiers:
        return w.write(w.call(arithmetic.fma, *operands, repr(mode)))
    operands = [w.call(arithmetic.flushed, operand) for operand in operands]
    return w.write(w.call(arithmetic.flushed, w.call(arithmetic.fma, *operands, repr(mode))))


def _divide(w: Writer) -> list[str]:
    if not w.is_float:
        w.only()
        function = arithmetic.quotient if w.instruction.root == "div" else arithmetic.remainder
        return w.write(w.call(function, w.read(1), w.read(2), w.constant(w.dtype)))
    if w.modifiers[0] == "rn":
        w.only("rn")
        return w.write(f"{w.read(1)} / {w.read(2)}")
    w.only("full", "approx")
    return w.write(f"({w.read(1, np.float32)}.astype(np.float64) / {w.read(2)}).astype(np.float32)")


APPROXIMATED = {
    "ex2": "np.exp2(value)",
    "lg2": "np.log2(value)",
    "sin": "np.sin(value)",
    "cos": "np.cos(value)",
    "sqrt": "np.sqrt(value)",
    "rsqrt": "1 / np.sqrt(value)",
    "rcp": "1 / value",
}


def _approximate(w: Writer) -> list[str]:
    """Compute in float64 and round: a GPU's result may differ in its last bits."""
    if w.instruction.root in ("sqrt", "rcp") and w.modifiers[0] == "rn":
        w.only("rn")
        return w.write(
            f"np.sqrt({w.read(1)})" if w.instruction.root == "sqrt" else f"{w.constant(w.dtype(1))} / {w.read(1)}"
        )
    if w.modifiers not in (["approx", "f32"], ["approx", "ftz", "f32"]):
        raise w.unknown()
    flush = "ftz" in w.modifiers
    operand = w.call(arithmetic.flushed, w.read(1)) if flush else w.read(1)
    result = f"({APPROXIMATED[w.instruction.root]}).astype(np.float32)"
    lines = [f"value = np.asarray({operand}).astype(np.float64)"]
    return lines + w.write(w.call(arithmetic.flushed, result) if flush else result)


def _negate(w: Writer) -> list[str]:
    w.only()
    return w.write(f"-{w.read(1)}" if w.is_float else f"{w.constant(w.dtype(0))} - {w.read(1)}")


def _absolute(w: Writer) -> list[str]:
    w.only(*["ftz"] * (w.dtype is np.float32))
    value = f"np.abs({w.read(1)})"
    return w.write(w.call(arithmetic.flushed, value) if "ftz" in w.modifiers else value)


def _invert(w: Writer) -> list[str]:
    w.only()
    return w.write(f"~{w.read(1)}")


def _bitwise(w: Writer) -> list[str]:
    w.only()
    return w.write(f"{w.read(1)} {SIGNS[w.instruction.root]} {w.read(2)}")


def _shift(w: Writer) -> list[str]:
    w.only()
    function = arithmetic.shifted_left if w.instruction.root == "shl" else arithmetic.shifted_right
    return w.write(w.call(function, w.read(1), w.read(2, np.uint32), w.constant(w.dtype)))


def _funnel_shift(w: Writer) -> list[str]:
    if w.modifiers not in (["l", "wrap", "b32"], ["r", "wrap", "b32"]):
        raise w.unknown()
    return w.write(w.call(arithmetic.funnel_shifted, w.read(1), w.read(2), w.read(3), w.modifiers[0] == "l"))


def _extreme(w: Writer) -> list[str]:
    """``min`` and ``max``."""
    w.only(*["NaN"] * (w.dtype is np.float32))
    least = w.instruction.root == "min"
    if not w.is_float:
        return w.write(f"np.{'minimum' if least else 'maximum'}({w.read(1)}, {w.read(2)})")
    if w.dtype is not np.float32:
        raise w.unknown()
    numbers = arithmetic.float_minimum if least else arithmetic.float_maximum
    with_nan = arithmetic.nan_minimum if least else arithmetic.nan_maximum
    return w.write(w.call(with_nan if "NaN" in w.modifiers else numbers, w.read(1), w.read(2)))


def _select(w: Writer) -> list[str]:
    w.only()
    return w.write(f"np.where({w.read(3, np.bool_)}, {w.read(1)}, {w.read(2)})")


COMPARED = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
UNORDERED = "(np.isnan(first) | np.isnan(second))"


def _comparison(w: Writer, comparison: str, is_float: bool) -> str:
    """Return the condition between ``first`` and ``second``; of floats, those that end in u are true for NaN."""
    if not is_float:
        if comparison not in COMPARED:
            raise w.unknown()
        return f"(first {COMPARED[comparison]} second)"
    if comparison in ("nan", "num"):
        return UNORDERED if comparison == "nan" else f"~{UNORDERED}"
    plain = comparison.removesuffix("u")
    if plain not in ("eq", "ne", "lt", "le", "gt", "ge"):
        raise w.unknown()
    condition, unordered = f"(first {COMPARED[plain]} second)", comparison.endswith("u")
    if unordered == (plain == "ne"):  # as numpy compares NaN
        return condition
    return f"({condition} | {UNORDERED})" if unordered else f"({condition} & ~{UNORDERED})"


def _compare(w: Writer) -> list[str]:
    """``setp``, also with a predicate to combine it with, or with a second result that is the opposite."""
    comparison, *combination, kind = w.modifiers
    if kind == "bf16":
        values = [w.call(arithmetic.from_bfloat16, w.read(k, np.uint16)) for k in (1, 2)]
    elif kind == "f16":
        values = [w.call(arithmetic.from_float16, w.read(k, np.uint16)) for k in (1, 2)]
    else:
        values = [w.read(k) for k in (1, 2)]
    lines = [f"first = {values[0]}", f"second = {values[1]}"]
    condition = _comparison(w, comparison, kind in ("bf16", "f16", "f32", "f64"))
    if combination:
        if len(combination) != 1 or combination[0] not in ("and", "or", "xor") or "|" in w.operands[0]:
            raise w.unknown()
        condition = f"({condition} {SIGNS[combination[0]]} {w.read(3, np.bool_)})"
    first, _, second = w.operands[0].partition("|")
    lines += [f"value = {condition}", w.write_text(first, "value", np.bool_)]
    return [*lines, w.write_text(second, "~value", np.bool_)] if second else lines


def _permute(w: Writer) -> list[str]:
    w.only()
    return w.write(w.call(arithmetic.permuted_bytes, w.read(1), w.read(2), w.read(3)))


def _look_up(w: Writer) -> list[str]:
    w.only()
    return w.write(w.call(arithmetic.looked_up, w.read(1), w.read(2), w.read(3), int(w.operands[4], 0)))


def _extract_bits(w: Writer) -> list[str]:
    w.only()
    begin, length = w.read(2, np.uint32), w.read(3, np.uint32)
    return w.write(w.call(arithmetic.extracted_bits, w.read(1), begin, length, w.constant(w.dtype)))


def _insert_bits(w: Writer) -> list[str]:
    w.only()
    begin, length = w.read(3, np.uint32), w.read(4, np.uint32)
    return w.write(w.call(arithmetic.inserted_bits, w.read(1), w.read(2), begin, length, w.constant(w.dtype)))


# ---- Conversions ----

SIXTEEN_BITS = {
    "bf16": (arithmetic.to_bfloat16, arithmetic.from_bfloat16),
    "f16": (arithmetic.to_float16, arithmetic.from_float16),
}


def _convert(w: Writer) -> list[str]:
    if len(w.modifiers) < 2:
        raise w.unknown()
    *how, to, origin = w.modifiers
    if to.removesuffix("x2") in SIXTEEN_BITS or origin in SIXTEEN_BITS:
        return _convert_16_bits(w, how, to, origin)
    if to not in DTYPES or origin not in DTYPES:
        raise w.unknown()
    result, given = DTYPES[to], DTYPES[origin]
    value = w.read_text(w.operands[1], given, narrow=True)
    if {result, given} <= {np.float32, np.float64}:
        return _convert_floats(w, how, value, result, given)
    if result in (np.float32, np.float64):
        if how != ["rn"]:  # numpy rounds once, too
            raise w.unknown()
        return w.write(f"np.asarray({value}).astype({w.constant(result)})", result)
    if given in (np.float32, np.float64):
        if len(how) != 1 or how[0] not in arithmetic.ROUNDED:
            raise w.unknown()
        converted = w.call(arithmetic.float_to_integer, value, w.constant(result), repr(how[0]))
    elif how:
        raise w.unknown()
    else:
        converted = f"np.asarray({value}).astype({w.constant(result)})"
    return [w.write_text(w.operands[0], converted, result, widen=True)]


def _convert_16_bits(w: Writer, how: list[str], to: str, origin: str) -> list[str]:
    if to in SIXTEEN_BITS and origin == "f32" and how == ["rn"]:
        return w.write(w.call(SIXTEEN_BITS[to][0], w.read(1, np.float32)), np.uint16)
    if to.endswith("x2") and origin == "f32" and how == ["rn"]:
        high, low = (w.call(SIXTEEN_BITS[to[:-2]][0], w.read(k, np.float32)) for k in (1, 2))
        return w.write(f"({high}.astype(np.uint32) << np.uint32(16)) | {low}.astype(np.uint32)", np.uint32)
    if to in ("f32", "f64") and not how:  # exact
        value = w.call(SIXTEEN_BITS[origin][1], w.read(1, np.uint16))
        return w.write(f"{value}.astype({w.constant(DTYPES[to])})", DTYPES[to])
    raise w.unknown()


def _convert_floats(w: Writer, how: list[str], value: str, result: type, given: type) -> list[str]:
    if result is given and how in (["sat"], ["ftz", "sat"]):
        value = w.call(arithmetic.flushed, value) if "ftz" in how else value
        return w.write(w.call(arithmetic.saturated, value), result)
    if result is given and len(how) == 1 and how[0] in arithmetic.ROUNDED:
        return w.write(f"np.{arithmetic.ROUNDED[how[0]].__name__}({value})", result)
    if (result is np.float64 and not how) or (given is np.float64 and result is np.float32 and how == ["rn"]):
        return w.write(f"np.asarray({value}).astype({w.constant(result)})", result)
    raise w.unknown()


HANDLERS: dict[str, Handler] = {
    **{"add": _add_or_subtract, "sub": _add_or_subtract, "mul": _multiply, "mad": _multiply_integers, "fma": _fused},
    **{"div": _divide, "rem": _divide, "neg": _negate, "abs": _absolute, "not": _invert},
    **dict.fromkeys(APPROXIMATED, _approximate),
    **{"and": _bitwise, "or": _bitwise, "xor": _bitwise, "shl": _shift, "shr": _shift, "shf": _funnel_shift},
    **{"min": _extreme, "max": _extreme, "selp": _select, "setp": _compare, "prmt": _permute, "lop3": _look_up},
    **{"bfe": _extract_bits, "bfi": _insert_bits, "cvt": _convert},
}
