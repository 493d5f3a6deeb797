// Reads and writes elements as floats: a vector of them, 16 bytes at a time, or one. Host and device, no torch.
//
// The binding refuses float64 on a GPU; where a switch has a case for it, that is float16's, which costs no
// instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/arguments.h"
#include "maths/element.h"
#include "maths/inline.h"

#if !defined(FASTGUIDE_CHECK_ALIGNED)  // the tests check what a GPU would refuse
#define FASTGUIDE_CHECK_ALIGNED(address)
#endif

namespace fastguide {

constexpr int kVector = 8;  // elements: 16 bytes of a 16-bit dtype, twice 16 bytes of float32
constexpr int kHalfVector = kVector / 2;

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

struct alignas(8) Bytes8 {
  uint32_t words[2];
};

struct Raw {  // the bits of a vector, or half of one; those of 16-bit elements, and of half a vector, are in low only
  Bytes16 low, high;
};

FASTGUIDE_INLINE Bytes16 load16(const char* from) {
  FASTGUIDE_CHECK_ALIGNED(from);
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Bytes16*>(from);
#else
  Bytes16 bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return bytes;
#endif
}

FASTGUIDE_INLINE void store16(char* to, const Bytes16& bytes) {
  FASTGUIDE_CHECK_ALIGNED(to);
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Bytes16*>(to) = bytes;
#else
  std::memcpy(to, &bytes, sizeof bytes);
#endif
}

FASTGUIDE_INLINE void load8(const char* from, Bytes16& into) {
#if defined(__CUDA_ARCH__)
  const Bytes8 bytes = *reinterpret_cast<const Bytes8*>(from);
  into.words[0] = bytes.words[0];
  into.words[1] = bytes.words[1];
#else
  std::memcpy(&into, from, sizeof(Bytes8));
#endif
}

FASTGUIDE_INLINE void store8(char* to, const Bytes16& bytes) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Bytes8*>(to) = {bytes.words[0], bytes.words[1]};
#else
  std::memcpy(to, &bytes, sizeof(Bytes8));
#endif
}

// The binary logarithm of an element's size in bytes.
FASTGUIDE_INLINE int element_size_bits(Element element) {
  switch (element) {
    case Element::float32:
      return 2;
    case Element::bfloat16:
    case Element::float16:
      return 1;
    case Element::float64:
      break;
  }
  FASTGUIDE_UNREACHABLE();
}

FASTGUIDE_INLINE const char* address(const Input& input, int64_t sample, int64_t place) {
  return static_cast<const char*>(input.data) +
         (sample * input.batch_stride + place) * (1 << element_size_bits(input.element));
}

FASTGUIDE_INLINE char* address(const Output& output, int64_t sample, int64_t place) {
  return static_cast<char*>(output.data) +
         (sample * output.batch_stride + place) * (1 << element_size_bits(output.element));
}

// Only loads: those of all tensors are issued before the first value is used. n: kVector or kHalfVector, here and
// below.
template <int n = kVector>
FASTGUIDE_INLINE Raw load_raw(const Input& input, int64_t sample, int64_t place) {
  const char* from = address(input, sample, place);
  Raw raw;
  const int bytes = n << element_size_bits(input.element);
  if (n < kVector && bytes < 16) {
    load8(from, raw.low);
  } else {
    raw.low = load16(from);
  }
  if (n == kVector && bytes > 16) raw.high = load16(from + 16);
  return raw;
}

template <int n>
FASTGUIDE_INLINE void unpack(const Raw& raw, Element element, float (&values)[n]) {
  static_assert(n == kVector || n == kHalfVector);
  switch (element) {
    case Element::float32:
      FASTGUIDE_UNROLL
      for (int i = 0; i < 4; ++i) {
        values[i] = float_of(raw.low.words[i]);
        if constexpr (n == kVector) values[i + 4] = float_of(raw.high.words[i]);
      }
      return;
    case Element::bfloat16:
      FASTGUIDE_UNROLL
      for (int i = 0; i < n / 2; ++i) {
        values[2 * i] = float_of(raw.low.words[i] << 16);
        values[2 * i + 1] = float_of(raw.low.words[i] & 0xFFFF0000u);
      }
      return;
    case Element::float16:
    case Element::float64:
      FASTGUIDE_UNROLL
      for (int i = 0; i < n / 2; ++i) {
        values[2 * i] = from_float16(uint16_t(raw.low.words[i]));
        values[2 * i + 1] = from_float16(uint16_t(raw.low.words[i] >> 16));
      }
      return;
  }
  FASTGUIDE_UNREACHABLE();
}

template <int n>
FASTGUIDE_INLINE void store_vector(const float (&values)[n], const Output& output, int64_t sample, int64_t place) {
  char* to = address(output, sample, place);
  Bytes16 bytes;
  switch (output.element) {
    case Element::float32:
      FASTGUIDE_UNROLL
      for (int i = 0; i < 4; ++i) bytes.words[i] = bits_of(values[i]);
      store16(to, bytes);
      if constexpr (n == kVector) {
        FASTGUIDE_UNROLL
        for (int i = 0; i < 4; ++i) bytes.words[i] = bits_of(values[i + 4]);
        store16(to + 16, bytes);
      }
      return;
    case Element::bfloat16:
      FASTGUIDE_UNROLL
      for (int i = 0; i < n / 2; ++i) {
        bytes.words[i] = to_bfloat16(values[2 * i]) | uint32_t(to_bfloat16(values[2 * i + 1])) << 16;
      }
      n == kVector ? store16(to, bytes) : store8(to, bytes);
      return;
    case Element::float16:
    case Element::float64:
      FASTGUIDE_UNROLL
      for (int i = 0; i < n / 2; ++i) {
        bytes.words[i] = to_float16(values[2 * i]) | uint32_t(to_float16(values[2 * i + 1])) << 16;
      }
      n == kVector ? store16(to, bytes) : store8(to, bytes);
      return;
  }
  FASTGUIDE_UNREACHABLE();
}

// One element's bits. Again only a load: those of all tensors are issued before the first value is used.
FASTGUIDE_INLINE uint32_t load_bits(const Input& input, int64_t sample, int64_t place) {
  const char* from = address(input, sample, place);
  switch (input.element) {
    case Element::float32:
      return *reinterpret_cast<const uint32_t*>(from);
    case Element::bfloat16:
    case Element::float16:
    case Element::float64:
      return *reinterpret_cast<const uint16_t*>(from);
  }
  FASTGUIDE_UNREACHABLE();
}

FASTGUIDE_INLINE float value_of(uint32_t bits, Element element) {
  switch (element) {
    case Element::float32:
      return float_of(bits);
    case Element::bfloat16:
      return from_bfloat16(uint16_t(bits));
    case Element::float16:
    case Element::float64:
      return from_float16(uint16_t(bits));
  }
  FASTGUIDE_UNREACHABLE();
}

FASTGUIDE_INLINE void store_one(float value, const Output& output, int64_t sample, int64_t place) {
  char* to = address(output, sample, place);
  switch (output.element) {
    case Element::float32:
      *reinterpret_cast<float*>(to) = value;
      return;
    case Element::bfloat16:
      *reinterpret_cast<uint16_t*>(to) = to_bfloat16(value);
      return;
    case Element::float16:
    case Element::float64:
      *reinterpret_cast<uint16_t*>(to) = to_float16(value);
      return;
  }
  FASTGUIDE_UNREACHABLE();
}

}  // namespace fastguide
