// Converts one element between its storage dtype and float. Host and device, no torch.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "maths/inline.h"

namespace fastguide {

enum class Element : int { float32, bfloat16, float16, float64 };

FASTGUIDE_INLINE constexpr int element_bytes(Element element) {
  switch (element) {
    case Element::float32:
      return 4;
    case Element::bfloat16:
    case Element::float16:
      return 2;
    case Element::float64:
      return 8;
  }
  FASTGUIDE_UNREACHABLE();
}

FASTGUIDE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTGUIDE_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTGUIDE_INLINE float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

FASTGUIDE_INLINE uint16_t to_bfloat16(float value) {  // rounds to nearest even
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value != value ? 0x7FC0u : rounded);
#endif
}

FASTGUIDE_INLINE float from_float16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t magnitude = uint32_t(bits & 0x7FFFu) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);  // 2^112 moves the exponent's bias; exact
  const uint32_t special = magnitude | 0x7F800000u;                  // infinity and NaN keep their mantissa
  const uint32_t value = magnitude >= 0x0F800000u ? special : bits_of(scaled);
  return float_of(value | (uint32_t(bits & 0x8000u) << 16));
#endif
}

FASTGUIDE_INLINE uint16_t to_float16(float value) {  // rounds to nearest even
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t magnitude = bits_of(value) ^ sign;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // the addition rounds
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? special : half;  // from 65520 on
  return uint16_t(half | (sign >> 16));
#endif
}

}  // namespace fastguide
