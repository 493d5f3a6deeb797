// Draws noise from counters: Philox4x32-10, and two streams of normal values made of it. Host and device, no torch.
//
// The torch stream has the values of torch.randn on a GPU, whose kernel distributes them over its own grid. The
// portable stream is keyed by a sample's seed and counted by step and element. It has the same bits everywhere, because
// it is made of integer operations and of single float operations that every device rounds alike. Therefore
//   - no product that is rounded may be contracted with a sum: setup.py's flags forbid it on the host, and the
//     intrinsics on a device;
//   - fastguide/step/noise.py and fastguide/step/backends/triton_noise.py have the same operations in the same order.
#pragma once

#include <cmath>
#include <cstdint>

#include "maths/element.h"
#include "maths/inline.h"

namespace fastguide {

struct Philox4 {
  uint32_t x, y, z, w;
};

// The whole product. nvcc makes two instructions of the plain expression.
FASTGUIDE_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
FASTGUIDE_INLINE Philox4 philox4x32_10(Philox4 c, uint64_t key) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  FASTGUIDE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = wide_product(0xD2511F53u, c.x), product1 = wide_product(0xCD9E8D57u, c.z);
    c = {uint32_t(product1 >> 32) ^ c.y ^ low, uint32_t(product1), uint32_t(product0 >> 32) ^ c.w ^ high,
         uint32_t(product0)};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return c;
}

struct Normal2 {
  float first, second;
};

// ---- The torch stream ----

// The call of Philox, the thread of torch's kernel, and which of the call's four values an element gets. Source:
// ATen/native/cuda/DistributionTemplates.h, distribution_elementwise_grid_stride_kernel with unroll 4.
struct TorchPosition {
  uint64_t call;
  uint32_t thread;
  int value;
};

FASTGUIDE_INLINE TorchPosition torch_position(uint64_t element, uint32_t threads) {
  if (element < threads) return {0, uint32_t(element), 0};
  const uint64_t round = element / threads;
  return {round / 4, uint32_t(element - round * threads), int(round % 4)};
}

FASTGUIDE_INLINE Philox4 torch_call(uint64_t seed, uint64_t offset, uint64_t call, uint32_t thread) {
  const uint64_t counter = offset / 4 + call;
  return philox4x32_10({uint32_t(counter), uint32_t(counter >> 32), thread, 0}, seed);
}

// curand's Box-Muller, sine first, with curand's device functions; on the host it agrees to a few units in the last
// place.
FASTGUIDE_INLINE Normal2 torch_normal(uint32_t a, uint32_t b) {
  constexpr float scale = 2.3283064e-10f;  // 2^-32
  constexpr float turn = 2.3283064e-10f * 6.2831855f;
  const float u = fmaf(float(a), scale, scale / 2);
  const float v = fmaf(float(b), turn, turn / 2);
  const float radius = sqrtf(-2.0f * logf(u));
  float sine, cosine;
#if defined(__CUDA_ARCH__)
  __sincosf(v, &sine, &cosine);
#else
  sine = sinf(v);
  cosine = cosf(v);
#endif
  return {sine * radius, cosine * radius};
}

FASTGUIDE_INLINE float torch_normal(uint64_t seed, uint64_t offset, uint64_t element, uint32_t threads) {
  const TorchPosition position = torch_position(element, threads);
  const Philox4 r = torch_call(seed, offset, position.call, position.thread);
  const Normal2 z = position.value < 2 ? torch_normal(r.x, r.y) : torch_normal(r.z, r.w);
  return position.value % 2 == 0 ? z.first : z.second;
}

// The amount by which torch advances the generator's offset for a tensor of this size.
FASTGUIDE_INLINE uint64_t torch_increment(uint64_t elements, uint32_t threads) {
  return elements == 0 ? 0 : ((elements - 1) / (uint64_t(threads) * 4) + 1) * 4;
}

// ---- The portable stream ----

FASTGUIDE_INLINE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTGUIDE_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// a * b + c where a * b is exact: then it does not matter whether the product is rounded.
FASTGUIDE_INLINE float add_exact(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// -2 ln(u) of u = (a + 1/2) / 2^32, in (0, 1]; relative error below 3e-7. The minimax polynomials here and below were
// fitted for this file.
FASTGUIDE_INLINE float portable_minus_two_log(uint32_t a) {
  const float u = add_exact(float(a), 2.3283064e-10f, 1.1641532e-10f);  // 2^-32, 2^-33
  const uint32_t shifted = bits_of(u) - 0x3F3504F3u;                    // of sqrt(1/2)
  const float exponent = float(int32_t(shifted) >> 23);                 // u = 2^exponent * (1 + f)
  const uint32_t mantissa = (shifted & 0x007FFFFFu) + 0x3F3504F3u;      // sqrt(1/2) <= 1 + f < sqrt(2)
  const float f = add(float_of(mantissa), -1.0f);
  float p = 0.20164758f;  // -2 ln(1 + f) = -2 f + f^2 p(f)
  p = add(multiply(p, f), -0.32361004f);
  p = add(multiply(p, f), 0.34486449f);
  p = add(multiply(p, f), -0.39813766f);
  p = add(multiply(p, f), 0.49942458f);
  p = add(multiply(p, f), -0.66669428f);
  p = add(multiply(p, f), 1.0000064f);
  const float log = add_exact(f, -2.0f, multiply(multiply(f, f), p));
  return add(multiply(exponent, -1.3862944f), log);
}

// Returns -value if the sign's highest bit is set.
FASTGUIDE_INLINE float negated(float value, uint32_t sign) { return float_of(bits_of(value) ^ (sign & 0x80000000u)); }

// Box & Muller 1958, cosine first. The angle is b / 2^32 of a turn: its nearest quarter is exact, in integers.
FASTGUIDE_INLINE Normal2 portable_normal(uint32_t a, uint32_t b) {
  const float radius = sqrtf(portable_minus_two_log(a));
  const uint32_t turned = b + 0x20000000u;  // the two highest bits are the quarter, modulo a turn
  const float y = multiply(float(int32_t((turned & 0x3FFFFFFFu) - 0x20000000u)), 1.8626451e-09f);  // 2^-29: |y| <= 1
  const float y2 = multiply(y, y);
  float sine = -3.5950452e-05f;
  sine = add(multiply(sine, y2), 0.0024900010f);
  sine = add(multiply(sine, y2), -0.080745436f);
  sine = multiply(add(multiply(sine, y2), 0.78539819f), y);
  float cosine = -0.00031902004f;
  cosine = add(multiply(cosine, y2), 0.015850201f);
  cosine = add(multiply(cosine, y2), -0.30842441f);
  cosine = add(multiply(cosine, y2), 1.0f);
  const bool odd = (turned & 0x40000000u) != 0;
  const float first = odd ? sine : cosine, second = odd ? cosine : sine;
  // The first value is negative in quarters 1 and 2, the second in 2 and 3.
  return {multiply(radius, negated(first, turned + 0x40000000u)), multiply(radius, negated(second, turned))};
}

struct Normal4 {
  float first, second, third, fourth;
};

// Elements 4 * block to 4 * block + 3 of a sample.
FASTGUIDE_INLINE Normal4 portable_normal(uint64_t seed, uint32_t step, uint64_t block) {
  const Philox4 r = philox4x32_10({uint32_t(block), uint32_t(block >> 32), step, 0}, seed);
  const Normal2 low = portable_normal(r.x, r.y), high = portable_normal(r.z, r.w);
  return {low.first, low.second, high.first, high.second};
}

FASTGUIDE_INLINE float portable_normal_of(uint64_t seed, uint32_t step, uint64_t element) {
  const Philox4 r = philox4x32_10({uint32_t(element / 4), uint32_t((element / 4) >> 32), step, 0}, seed);
  const bool low = element % 4 < 2;
  const Normal2 z = portable_normal(low ? r.x : r.z, low ? r.y : r.w);
  return element % 2 == 0 ? z.first : z.second;
}

// Converts an element's place in memory to its place in a contiguous sample; see StepArguments::channels.
FASTGUIDE_INLINE int64_t counted_place(int64_t place, int64_t channels, int64_t elements_per_sample) {
  if (channels == 1) return place;
  const int64_t inner = place / channels;
  return (place - inner * channels) * (elements_per_sample / channels) + inner;
}

}  // namespace fastguide
