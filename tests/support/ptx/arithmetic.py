"""Arithmetic of PTX over numpy arrays: exact fused multiply-adds, conversions, and integer and bit operations.

numpy's float32 and float64 operations are IEEE's. ``fma`` is exact in every rounding mode: the product of two float32
is exact in float64, and so is the error of a float64 sum (TwoSum). The sum is rounded to odd with it, and that rounded
once more to float32 is the correctly rounded result, because 53 bits are two more than 24 at least (Boldo and
Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

Array = NDArray
SMALLEST_NORMAL = np.float32(2.0**-126)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDER = {np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64}

# ---- Floating point ----


_libm = ctypes.CDLL(None)
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = (ctypes.c_double,) * 3
_fma_of_numbers = np.vectorize(_libm.fma, otypes=[np.float64])


def fma_of_doubles(first: Array, second: Array, third: Array) -> Array:
    """Return fused multiply-adds of float64: the C library's, number by number."""
    return _fma_of_numbers(first, second, third)


def _rounded_to_odd(total: Array, error: Array) -> Array:
    """Round a float64 sum and its error to the neighbour whose last bit is 1, unless the sum is exact."""
    bits = total.view(np.int64).copy()
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return bits.view(np.float64)


def _rounded_to_float32(value: Array, mode: str) -> Array:
    nearest = value.astype(np.float32)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    if mode == "rm":
        return np.where(back > value, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    if mode == "rp":
        return np.where(back < value, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return np.where(np.abs(back) > np.abs(value), np.nextafter(nearest, np.float32(0)), nearest)


def fma(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """Multiply and add float32 with one rounding: to nearest (rn), down (rm), up (rp) or to zero (rz)."""
    product = np.atleast_1d(np.asarray(a, np.float64) * np.asarray(b, np.float64))
    product, addend = np.broadcast_arrays(product, np.asarray(c, np.float64))
    total = product + addend
    of_addend = total - product
    error = (product - (total - of_addend)) + (addend - of_addend)
    if mode == "rm":  # a sum that is 0, of terms that are not both 0 of one sign, is -0 when rounded down
        opposite = np.signbit(product) != np.signbit(addend)
        total = np.where((total == 0) & opposite, -0.0, total)
    return _rounded_to_float32(_rounded_to_odd(total, error), mode)


def flushed(x: Array) -> Array:
    """Put zeros in the place of subnormal values."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def saturated(x: Array) -> Array:
    """Clamp to [0, 1]; NaN is 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def float_minimum(a: Array, b: Array) -> Array:
    """Return the lesser value, or the one that is not NaN; -0 is less than 0."""
    least = np.where(np.signbit(a) | np.signbit(b), np.float32(-0.0), np.float32(0.0))
    return np.where((a == 0) & (b == 0), least, np.fmin(a, b))


def float_maximum(a: Array, b: Array) -> Array:
    """Return the greater value, or the one that is not NaN; 0 is greater than -0."""
    return -float_minimum(-a, -b)


def nan_minimum(a: Array, b: Array) -> Array:
    """Return the lesser value, or NaN if one is."""
    return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), float_minimum(a, b))


def nan_maximum(a: Array, b: Array) -> Array:
    """Return the greater value, or NaN if one is."""
    return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), float_maximum(a, b))


# ---- Conversions ----


def to_bfloat16(x: Array) -> Array:
    """Round float32 to the nearest bfloat16's bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    half = np.uint64(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(
        np.isnan(x), np.uint16(0x7FFF), ((bits.astype(np.uint64) + half) >> np.uint64(16)).astype(np.uint16)
    )


def to_float16(x: Array) -> Array:
    """Round float32 to the nearest float16's bits."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x, np.float32).astype(np.float16).view(np.uint16))


def from_bfloat16(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float16(bits: Array) -> Array:
    return np.asarray(bits).view(np.float16).astype(np.float32)


ROUNDED = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(x: Array, dtype: type[np.integer], mode: str) -> Array:
    """Round to a whole number; what the dtype does not hold is its nearest value. NaN is 0, or 2^63 in 64 bits."""
    limits = np.iinfo(dtype)
    rounded = ROUNDED[mode](np.asarray(x, np.float64))
    above = rounded >= 2.0 ** (limits.bits - (limits.min < 0))
    below = rounded < limits.min
    inside = np.where(above | below | np.isnan(rounded), 0, rounded).astype(dtype)
    result = np.where(above, dtype(limits.max), np.where(below, dtype(limits.min), inside))
    of_nan = np.array(1 << 63 if limits.bits == 64 else 0, np.uint64).astype(dtype)
    return np.where(np.isnan(rounded), of_nan, result)


# ---- Integers ----


def shifted_left(a: Array, amount: Array, dtype: type[np.integer]) -> Array:
    """Shift; by as many bits as there are or more, it is 0."""
    bits = np.iinfo(dtype).bits
    amount = np.asarray(amount, np.uint32)
    return np.where(amount >= bits, dtype(0), a << np.minimum(amount, bits - 1).astype(dtype))


def shifted_right(a: Array, amount: Array, dtype: type[np.integer]) -> Array:
    """Shift; by as many bits as there are or more, it is the sign, or 0."""
    limits = np.iinfo(dtype)
    amount = np.asarray(amount, np.uint32)
    shifted = a >> np.minimum(amount, limits.bits - 1).astype(dtype)
    return shifted if limits.min < 0 else np.where(amount >= limits.bits, dtype(0), shifted)


def funnel_shifted(low: Array, high: Array, amount: Array, left: bool) -> Array:
    """Shift two words of 32 bits by up to 31: the upper word of it to the left, or the lower to the right."""
    both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
    amount = np.asarray(amount, np.uint32).astype(np.uint64) & np.uint64(31)
    return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)


def quotient(a: Array, b: Array, dtype: type[np.integer]) -> Array:
    """Divide and round to zero; by 0, all bits are 1."""
    zero = np.asarray(b) == 0
    divisor = np.where(zero, dtype(1), b)
    down = a // divisor
    if np.iinfo(dtype).min < 0:
        down = down + ((a % divisor != 0) & ((a < 0) != (divisor < 0)))
    return np.where(zero, ~dtype(0), down)


def remainder(a: Array, b: Array, dtype: type[np.integer]) -> Array:
    return a - quotient(a, b, dtype) * b


def product_high(a: Array, b: Array, dtype: type[np.integer]) -> Array:
    """Return the upper half of the product."""
    a, b = np.asarray(a, dtype), np.asarray(b, dtype)
    if dtype in WIDER:
        wide = WIDER[dtype]
        return ((a.astype(wide) * b.astype(wide)) >> wide(np.iinfo(dtype).bits)).astype(dtype)
    if dtype is np.int64:
        high = product_high(a.view(np.uint64), b.view(np.uint64), np.uint64)
        high = high - np.where(a < 0, b.view(np.uint64), np.uint64(0))
        return (high - np.where(b < 0, a.view(np.uint64), np.uint64(0))).view(np.int64)
    word, bits = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = a & word, a >> bits, b & word, b >> bits
    middle = a_high * b_low + ((a_low * b_low) >> bits)
    return a_high * b_high + (middle >> bits) + ((a_low * b_high + (middle & word)) >> bits)


# ---- Bits ----


def permuted_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: choose each byte of the result among eight, or its sign."""
    words = np.broadcast_arrays(a, b, selector)
    bytes_ = np.stack([(word >> np.uint32(8 * k)) & np.uint32(0xFF) for word in words[:2] for k in range(4)], -1)
    result = np.zeros(words[0].shape, np.uint32)
    for k in range(4):
        choice = (words[2] >> np.uint32(4 * k)) & np.uint32(0xF)
        byte = np.take_along_axis(bytes_, (choice & np.uint32(7)).astype(np.intp)[..., None], -1)[..., 0]
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result |= np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * k)
    return result


def looked_up(a: Array, b: Array, c: Array, table: int) -> Array:
    """``lop3``: look up each bit of the result by three bits, of which a's is the highest."""
    result = (a ^ a) | (b ^ b) | (c ^ c)
    for k in range(8):
        if table >> k & 1:
            result = result | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return result


def _mask(length: Array, dtype: type[np.integer]) -> Array:
    limits = np.iinfo(dtype)
    ones = (dtype(1) << np.minimum(length, limits.bits - 1).astype(dtype)) - dtype(1)
    return np.where(length >= limits.bits, ~dtype(0), ones)


def extracted_bits(a: Array, begin: Array, length: Array, dtype: type[np.integer]) -> Array:
    """``bfe``: take a field of bits; a signed one is extended by its highest bit, or a's where it reaches beyond."""
    limits = np.iinfo(dtype)
    begin, length = np.asarray(begin, np.uint32) & np.uint32(255), np.asarray(length, np.uint32) & np.uint32(255)
    shifted = shifted_right(a, begin, dtype)
    if limits.min == 0:
        return shifted & _mask(length, dtype)
    inside = (length > 0) & (length < limits.bits) & (begin + length < limits.bits)
    unused = np.where(inside, limits.bits - np.minimum(length, limits.bits), 0).astype(dtype)
    return np.where(length == 0, dtype(0), (shifted << unused) >> unused)


def inserted_bits(a: Array, b: Array, begin: Array, length: Array, dtype: type[np.integer]) -> Array:
    """``bfi``: put a's lowest bits in the place of a field of b's."""
    begin, length = np.asarray(begin, np.uint32) & np.uint32(255), np.asarray(length, np.uint32) & np.uint32(255)
    mask = shifted_left(_mask(length, dtype), begin, dtype)
    return (shifted_left(a, begin, dtype) & mask) | (b & ~mask)
