"""The noise of the Triton kernel: the two streams of csrc/maths/philox.h."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Triton runs these files in its interpreter, on the CPU: it has no libdevice.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _add(a, b, PTX: tl.constexpr):
    """Add with a rounding of its own: ptxas up to 13.0 joins products and sums that LLVM packed in pairs."""
    if PTX:
        return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    else:
        return a + b


@triton.jit
def _negated(value, sign):
    """Return -value where the sign's highest bit is set."""
    return (value.to(tl.int32, bitcast=True) ^ (sign & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _torch_normals(a, b):
    """Apply curand's Box-Muller, sine first; see torch_normal in csrc/maths/philox.h."""
    u = tl.fma(a.to(tl.float32), 2.3283064e-10, 1.1641532e-10)
    v = tl.fma(b.to(tl.float32), 1.4629181e-09, 7.3145904e-10)  # 2^-32 of a turn, and half of that
    if INTERPRETED:
        radius = tl.sqrt_rn(-2.0 * tl.log(u))
        sine, cosine = tl.sin(v), tl.cos(v)
    else:
        radius = tl.sqrt_rn(-2.0 * libdevice.log(u))
        sine, cosine = libdevice.fast_sinf(v), libdevice.fast_cosf(v)
    return sine * radius, cosine * radius


@triton.jit
def _portable_normals(a, b, PTX: tl.constexpr):
    """Compute portable_normal of csrc/maths/philox.h: the same bits, as nothing is contracted but exact products."""
    u = tl.fma(a.to(tl.float32), 2.3283064e-10, 1.1641532e-10)
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = _add(((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True), -1.0, PTX)
    p = _add(f * 0.20164758, -0.32361004, PTX)
    p = _add(p * f, 0.34486449, PTX)
    p = _add(p * f, -0.39813766, PTX)
    p = _add(p * f, 0.49942458, PTX)
    p = _add(p * f, -0.66669428, PTX)
    p = _add(p * f, 1.0000064, PTX)
    radius = tl.sqrt_rn(_add(exponent * -1.3862944, tl.fma(f, -2.0, f * f * p), PTX))
    turned = b.to(tl.int32, bitcast=True) + 0x20000000
    y = ((turned & 0x3FFFFFFF) - 0x20000000).to(tl.float32) * 1.8626451e-09
    y2 = y * y
    sine = _add(y2 * -3.5950452e-05, 0.0024900010, PTX)
    sine = _add(sine * y2, -0.080745436, PTX)
    sine = _add(sine * y2, 0.78539819, PTX) * y
    cosine = _add(y2 * -0.00031902004, 0.015850201, PTX)
    cosine = _add(cosine * y2, -0.30842441, PTX)
    cosine = _add(cosine * y2, 1.0, PTX)
    odd = (turned & 0x40000000) != 0
    first = _negated(tl.where(odd, sine, cosine), turned + 0x40000000)
    second = _negated(tl.where(odd, cosine, sine), turned)
    return radius * first, radius * second


@triton.jit
def counted_place(place, channels, size, COUNTED: tl.constexpr):
    """Return an element's place in a contiguous sample; see StepArguments::channels in csrc/kernels/arguments.h."""
    if COUNTED:
        return place
    return (place % channels) * (size // channels) + place // channels


@triton.jit
def word64(low, high):
    """Return 64 bits of two words that came as int32."""
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def draw_portable(
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
    return draw_portable_singly(seed, step, first + tl.arange(0, BLOCK), size, channels, COUNTED, PTX)


@triton.jit
def draw_portable_singly(seed, step, place, size, channels, COUNTED: tl.constexpr, PTX: tl.constexpr):
    """Draw the values of elements at any places of their sample, each by a call of its own."""
    step = step.to(tl.uint32)
    zero = step * 0
    element = counted_place(place, channels, size, COUNTED)
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
def draw_torch(seed, offset, call, thread):
    """Return the four values that torch makes of such a call."""
    words = _torch_call(seed, offset, call, thread)
    z0, z1 = _torch_normals(words[0], words[1])
    z2, z3 = _torch_normals(words[2], words[3])
    return z0, z1, z2, z3


@triton.jit
def draw_torch_singly(seed, offset, element, threads):
    """Return the value that torch makes for each element, counted as it lies in memory: one of its call's four."""
    dealt = element // threads.to(tl.uint32)
    words = _torch_call(seed, offset, (dealt // 4).to(tl.uint64), element % threads.to(tl.uint32))
    low = dealt % 4 < 2
    z0, z1 = _torch_normals(tl.where(low, words[0], words[2]), tl.where(low, words[1], words[3]))
    return tl.where(dealt % 2 == 0, z0, z1)
