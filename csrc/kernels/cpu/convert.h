// Converts runs of elements between storage dtypes and the type of the arithmetic, vectorised. Host only.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels/arguments.h"
#include "maths/element.h"
#include "maths/inline.h"

namespace fastguide {

// `from` and `to` are the same memory or apart, never partly the same.
template <typename T>
FASTGUIDE_INLINE void load_float16(const uint16_t* from, T* to, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)  // masked with all ones, because g++ 12 warns about the others
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 16 <= count; i += 16) {
      _mm512_storeu_ps(to + i,
                       _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    }
  }
#elif defined(__F16C__)
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
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 16 <= count; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#elif defined(__F16C__)
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) to[i] = to_float16(float(from[i]));
}

// Returns the elements as T: in place if they are stored so, otherwise converted into scratch.
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
