// Runs of elements between storage dtypes and the arithmetic's type, vectorised. Host only, internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "step.h"
#include "step_cpu.h"

namespace fastguide {

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
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value != value ? 0x7FC0u : rounded);
}

FASTGUIDE_INLINE float from_float16(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7FFFu) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);  // 2^112 moves the exponent's bias; exact
  const uint32_t special = magnitude | 0x7F800000u;                  // infinity and NaN keep their mantissa
  const uint32_t value = magnitude >= 0x0F800000u ? special : bits_of(scaled);
  return float_of(value | (uint32_t(bits & 0x8000u) << 16));
}

FASTGUIDE_INLINE uint16_t to_float16(float value) {  // rounds to nearest even
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t magnitude = bits_of(value) ^ sign;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // the addition rounds
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? special : half;  // from 65520 on
  return uint16_t(half | (sign >> 16));
}

// Each pair of arguments is distinct memory or the same; never partly the same.
template <typename T>
FASTGUIDE_INLINE void load_float16(const uint16_t* from, T* to, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < count; ++i) to[i] = T(from_float16(from[i]));
}

template <typename T>
FASTGUIDE_INLINE void store_float16(const T* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) to[i] = to_float16(float(from[i]));
}

// The elements as T: in place if that is how they are stored, otherwise converted into scratch.
template <typename T>
FASTGUIDE_INLINE const T* load(const Input& input, int64_t offset, int64_t count, T* scratch) {
  switch (input.element) {
    case Element::float32: {
      const float* from = static_cast<const float*>(input.data) + offset;
      if constexpr (sizeof(T) == sizeof(float)) return from;
      for (int64_t i = 0; i < count; ++i) scratch[i] = T(from[i]);
      break;
    }
    case Element::float64: {
      const double* from = static_cast<const double*>(input.data) + offset;
      if constexpr (sizeof(T) == sizeof(double)) return from;
      for (int64_t i = 0; i < count; ++i) scratch[i] = T(from[i]);
      break;
    }
    case Element::bfloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(input.data) + offset;
      for (int64_t i = 0; i < count; ++i) scratch[i] = T(from_bfloat16(from[i]));
      break;
    }
    case Element::float16:
      load_float16(static_cast<const uint16_t*>(input.data) + offset, scratch, count);
      break;
  }
  return scratch;
}

template <typename T>
FASTGUIDE_INLINE bool stored_as(Element element) {
  return element == (sizeof(T) == sizeof(float) ? Element::float32 : Element::float64);
}

template <typename T>
FASTGUIDE_INLINE void store(const T* from, const Output& output, int64_t offset, int64_t count) {
  switch (output.element) {
    case Element::float32: {
      float* to = static_cast<float*>(output.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
      break;
    }
    case Element::float64: {
      double* to = static_cast<double*>(output.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = double(from[i]);
      break;
    }
    case Element::bfloat16: {
      uint16_t* to = static_cast<uint16_t*>(output.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(float(from[i]));
      break;
    }
    case Element::float16:
      store_float16(from, static_cast<uint16_t*>(output.data) + offset, count);
      break;
  }
}

}  // namespace fastguide
