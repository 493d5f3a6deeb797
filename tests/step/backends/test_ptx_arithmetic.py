"""The PTX interpreter's arithmetic: against libm, Python's integers, and torch."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import random

import numpy as np
import pytest
import torch

from tests.support.ptx import arithmetic

ROUNDING = {  # of fesetround: to nearest, down, up, to zero
    "x86_64": {"rn": 0, "rm": 0x400, "rp": 0x800, "rz": 0xC00},
    "aarch64": {"rn": 0, "rm": 0x800000, "rp": 0x400000, "rz": 0xC00000},
}


def triples(count: int) -> list[tuple[np.ndarray, ...]]:
    """Draw any bits, common values, sums that nearly cancel, that are subnormal, and that are 0."""
    generator = np.random.default_rng(0)
    any_bits = generator.integers(0, 2**32, (3, count), dtype=np.uint64).astype(np.uint32).view(np.float32)
    common = generator.standard_normal((3, count)).astype(np.float32)
    a, b, c = common
    tiny = np.float32(1e-22)
    nearly = -(a * b) + np.float32(1e-9) * c
    found = [tuple(any_bits), (a, b, c), (a, b, -(a * b)), (a, b, nearly)]
    return [*found, (a * tiny, b * tiny, c * np.float32(1e-44)), (np.rint(a), np.rint(b), -(np.rint(a) * np.rint(b)))]


@pytest.mark.skipif(platform.machine() not in ROUNDING, reason="the rounding modes' numbers are not known")
@pytest.mark.parametrize("mode", ["rn", "rm", "rp", "rz"])
def test_fma_is_that_of_libm(mode):
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    with np.errstate(all="ignore"):
        for a, b, c in triples(4000):
            got = arithmetic.fma(a, b, c, mode)
            libm.fesetround(ROUNDING[platform.machine()][mode])
            values = [libm.fmaf(*numbers) for numbers in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
            libm.fesetround(0)
            want = np.array(values, np.float32)
            same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
            assert same.all(), (a[~same][0], b[~same][0], c[~same][0], got[~same][0], want[~same][0])


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def word(value: int, dtype: type = np.uint32) -> np.ndarray:
    return np.array([value], np.uint64).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def test_products_shifts_and_quotients():
    draw = random.Random(0)
    for _ in range(500):
        a, b, amount = draw.getrandbits(64), draw.getrandbits(draw.choice([1, 8, 31, 64])), draw.randrange(70)
        low, other = a % 2**32, b % 2**32
        assert arithmetic.product_high(word(low), word(other), np.uint32)[0] == low * other >> 32
        assert arithmetic.product_high(word(a, np.uint64), word(b, np.uint64), np.uint64)[0] == a * b >> 64
        for dtype, bits in ((np.int32, 32), (np.int64, 64)):
            x, y = word(a % 2**bits, dtype), word(b % 2**bits, dtype)
            p, q = signed(a % 2**bits, bits), signed(b % 2**bits, bits)
            assert arithmetic.product_high(x, y, dtype)[0] == p * q >> bits
            assert arithmetic.shifted_right(x, np.uint32(amount), dtype)[0] == p >> amount
            if q:
                toward_zero = abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)
                assert arithmetic.quotient(x, y, dtype)[0] == signed(toward_zero % 2**bits, bits)
                assert arithmetic.remainder(x, y, dtype)[0] == p - toward_zero * q
        assert arithmetic.shifted_left(word(low), np.uint32(amount), np.uint32)[0] == (low << amount) % 2**32
        assert arithmetic.shifted_right(word(low), np.uint32(amount), np.uint32)[0] == low >> amount
        both, turn = other << 32 | low, amount % 32
        assert arithmetic.funnel_shifted(word(low), word(other), np.uint32(amount), True)[0] == both << turn >> 32 & (
            2**32 - 1
        )
        assert arithmetic.funnel_shifted(word(low), word(other), np.uint32(amount), False)[0] == both >> turn & (
            2**32 - 1
        )
    assert arithmetic.quotient(word(7), word(0), np.uint32)[0] == 2**32 - 1


def test_bits():
    draw = random.Random(1)
    for _ in range(500):
        a, b, c = (draw.getrandbits(32) for _ in range(3))
        table, begin, length = draw.randrange(256), draw.randrange(40), draw.randrange(40)
        index = [(a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1) for k in range(32)]
        want = sum((table >> i & 1) << k for k, i in enumerate(index))
        assert arithmetic.looked_up(word(a), word(b), word(c), table)[0] == want

        field = [a >> min(begin + k, 31) & 1 if begin + k < 32 else a >> 31 for k in range(min(length, 32))]
        sign = a >> min(begin + length - 1, 31) & 1 if length else 0
        want = sum(bit << k for k, bit in enumerate(field + [sign] * (32 - len(field))))
        got = arithmetic.extracted_bits(word(a, np.int32), np.uint32(begin), np.uint32(length), np.int32)
        assert got.view(np.uint32)[0] == want
        mask = (1 << min(length, 32)) - 1
        assert (
            arithmetic.extracted_bits(word(a), np.uint32(begin), np.uint32(length), np.uint32)[0] == a >> begin & mask
        )
        place = (mask << begin) % 2**32
        want = ((a << begin) & place) | (b & ~place)
        assert arithmetic.inserted_bits(word(a), word(b), np.uint32(begin), np.uint32(length), np.uint32)[0] == want

        bytes_ = (b << 32 | a).to_bytes(8, "little")
        picked = [(bytes_[c >> 4 * k & 7], c >> 4 * k & 8) for k in range(4)]
        want = int.from_bytes([(0xFF if byte >> 7 else 0) if as_sign else byte for byte, as_sign in picked], "little")
        assert arithmetic.permuted_bytes(word(a), word(b), word(c))[0] == want


def test_conversions_are_those_of_torch():
    drawn = triples(20000)[0][0].view(np.uint32)
    halves = [drawn >> n << n | 1 << n - 1 for n in (16, 13)]  # between two values of bfloat16, and of float16
    bits = np.concatenate([drawn, *halves]).astype(np.uint32).view(np.float32)
    values = torch.from_numpy(bits)
    with np.errstate(all="ignore"):
        for dtype, to, back in (
            (torch.bfloat16, arithmetic.to_bfloat16, arithmetic.from_bfloat16),
            (torch.float16, arithmetic.to_float16, arithmetic.from_float16),
        ):
            want = values.to(dtype)
            numbers = ~want.isnan().numpy()
            got = to(bits)
            assert np.array_equal(got[numbers], want.view(torch.int16).numpy().view(np.uint16)[numbers])
            assert np.array_equal(np.isnan(back(got)), ~numbers)
            assert np.array_equal(back(got)[numbers], want.float().numpy()[numbers])
        some = np.array([2.5, -2.5, 3.5, 3e38, -3e38, np.nan], np.float32)
        for mode, want in {"rni": [2, -2, 4], "rzi": [2, -2, 3], "rmi": [2, -3, 3], "rpi": [3, -2, 4]}.items():
            got = arithmetic.float_to_integer(some, np.int32, mode).tolist()
            assert got == [*want, 2**31 - 1, -(2**31), 0]
        assert arithmetic.float_to_integer(some, np.int64, "rzi").tolist()[3:] == [2**63 - 1, -(2**63), -(2**63)]


def test_least_and_greatest():
    a = np.array([1, np.nan, 0.0, -0.0, np.nan], np.float32)
    b = np.array([2, 3, -0.0, 0.0, np.nan], np.float32)
    assert str(arithmetic.float_minimum(a, b).tolist()) == "[1.0, 3.0, -0.0, -0.0, nan]"
    assert str(arithmetic.float_maximum(a, b).tolist()) == "[2.0, 3.0, 0.0, 0.0, nan]"
    assert str(arithmetic.nan_minimum(a, b).tolist()) == "[1.0, nan, -0.0, -0.0, nan]"
    assert str(arithmetic.nan_maximum(a, b).tolist()) == "[2.0, nan, 0.0, 0.0, nan]"
