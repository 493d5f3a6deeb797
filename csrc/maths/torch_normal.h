// The normal values that torch draws on x86 processors with AVX2, in its own arithmetic: aten/src/ATen/native/cpu,
// DistributionTemplates.h and avx_mathfun.h. Host only. Each product and sum is joined where torch's compiler has.
#pragma once

#include "maths/element.h"
#include "maths/philox.h"

namespace fastguide {

// ---- The engine: Matsumoto & Nishimura 1998, MT19937 ----

constexpr int kTwisterWords = 624;
constexpr int kTwisterMiddle = 397;

FASTGUIDE_INLINE uint32_t twist(uint32_t high, uint32_t low) {
  const uint32_t mixed = (high & 0x80000000u) | (low & 0x7FFFFFFFu);
  return (mixed >> 1) ^ ((0u - (low & 1u)) & 0x9908B0DFu);
}

FASTGUIDE_INLINE uint32_t tempered(uint32_t word) {
  word ^= word >> 11;
  word ^= (word << 7) & 0x9D2C5680u;
  word ^= (word << 15) & 0xEFC60000u;
  return word ^ (word >> 18);
}

// A word's lowest 24 bits as a number from 0 to below 1.
FASTGUIDE_INLINE float torch_uniform(uint32_t word) {
  return float(int32_t(tempered(word) & 0x00FFFFFFu)) * 5.9604645e-08f;  // 2^-24
}

// ---- Elementary functions, after Moshier's Cephes library in single precision ----

// ln(u), 0 < u <= 1.
FASTGUIDE_INLINE float cephes_log(float u) {
  const uint32_t bits = bits_of(u);
  const float mantissa = float_of((bits & 0x007FFFFFu) | 0x3F000000u);  // 1/2 <= mantissa < 1
  const bool small = mantissa < 0.70710677f;                            // sqrt(1/2)
  const float exponent = float(int32_t(bits >> 23) - 127) + 1.0f - (small ? 1.0f : 0.0f);
  const float f = mantissa - 1.0f + (small ? mantissa : 0.0f), f2 = f * f;
  float p = 7.0376836e-2f;
  p = fmaf(p, f, -1.1514610e-1f);
  p = fmaf(p, f, 1.16769987e-1f);
  p = fmaf(p, f, -1.2420141e-1f);
  p = fmaf(p, f, 1.4249323e-1f);
  p = fmaf(p, f, -1.6668057e-1f);
  p = fmaf(p, f, 2.0000714e-1f);
  p = fmaf(p, f, -2.4999994e-1f);
  p = fmaf(p, f, 3.3333331e-1f);
  p = fmaf(p * f, f2, exponent * -2.1219444e-4f);
  p = fmaf(f2, -0.5f, p);
  return fmaf(exponent, 0.693359375f, f + p);  // ln(2) in two parts
}

// sin(x) and cos(x), 0 <= x <= 2 pi. `eighth` counts eighths of a turn, up to the next even one.
FASTGUIDE_INLINE Normal2 cephes_cosine_and_sine(float x) {
  const int32_t eighth = (int32_t(x * 1.2732395f) + 1) & ~1;  // 4 / pi
  const float count = float(eighth);
  x = fmaf(count, -0.78515625f, x);  // pi / 4 in three parts
  x = fmaf(count, -2.4187565e-4f, x);
  x = fmaf(count, -3.7748950e-8f, x);
  const float x2 = x * x;
  float cosine = 2.4433157e-5f;
  cosine = fmaf(cosine, x2, -1.3887316e-3f);
  cosine = fmaf(cosine, x2, 4.1666646e-2f);
  cosine = fmaf(cosine * x2, x2, x2 * -0.5f) + 1.0f;
  float sine = -1.9515296e-4f;
  sine = fmaf(sine, x2, 8.3321609e-3f);
  sine = fmaf(sine, x2, -1.6666655e-1f);
  sine = fmaf(sine * x2, x, x);
  const bool swapped = (eighth & 2) != 0;
  const uint32_t sign = uint32_t(eighth) << 29;             // of the sine: the third bit
  const uint32_t cosine_sign = uint32_t(eighth + 2) << 29;  // the cosine of x is the sine of a quarter more
  return {negated(swapped ? sine : cosine, cosine_sign), negated(swapped ? cosine : sine, sign)};
}

// Box & Muller 1958, of two uniform values; zeros are positive.
FASTGUIDE_INLINE Normal2 torch_normal(float u, float v) {
  const float radius = sqrtf(-2.0f * cephes_log(1.0f - u));
  const Normal2 direction = cephes_cosine_and_sine(6.2831855f * v);
  return {radius * direction.first + 0.0f, radius * direction.second + 0.0f};
}

}  // namespace fastguide
