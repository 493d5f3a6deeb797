// Elements between memory and float: a vector of them, 16 bytes at a time, or one. Host and device, no torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/arguments.h"
#include "maths/element.h"
#include "maths/inline.h"

#if !defined(FASTGUIDE_CHECK_ALIGNED)  // the tests refuse what a GPU would
#define FASTGUIDE_CHECK_ALIGNED(address)
#endif

namespace fastguide {

constexpr int kVector = 8;  // elements: 16 bytes of a 16-bit dtype, twice 16 of float32

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

struct Raw {  // kVector elements as they are stored: 16-bit ones in low alone
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

FASTGUIDE_INLINE const char* address(const Input& input, int64_t sample, int64_t place) {
  return static_cast<const char*>(input.data) + (sample * input.batch_stride + place) * element_bytes(input.element);
}

FASTGUIDE_INLINE char* address(const Output& output, int64_t sample, int64_t place) {
  return static_cast<char*>(output.data) + (sample * output.batch_stride + place) * element_bytes(output.element);
}

// Loads alone, so that those of all tensors are under way before the first is waited for.
FASTGUIDE_INLINE Raw load_raw(const Input& input, int64_t sample, int64_t place) {
  const char* from = address(input, sample, place);
  Raw raw;
  raw.low = load16(from);
  if (input.element == Element::float32) raw.high = load16(from + 16);
  return raw;
}

FASTGUIDE_INLINE void unpack(const Raw& raw, Element element, float (&values)[kVector]) {
  if (element == Element::float32) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) {
      values[i] = float_of(raw.low.words[i]);
      values[i + 4] = float_of(raw.high.words[i]);
    }
  } else if (element == Element::bfloat16) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = float_of(raw.low.words[i] << 16);
      values[2 * i + 1] = float_of(raw.low.words[i] & 0xFFFF0000u);
    }
  } else {
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = from_float16(uint16_t(raw.low.words[i]));
      values[2 * i + 1] = from_float16(uint16_t(raw.low.words[i] >> 16));
    }
  }
}

FASTGUIDE_INLINE void store_vector(const float (&values)[kVector], const Output& output, int64_t sample,
                                   int64_t place) {
  char* to = address(output, sample, place);
  Bytes16 bytes;
  if (output.element == Element::float32) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) bytes.words[i] = bits_of(values[i]);
    store16(to, bytes);
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) bytes.words[i] = bits_of(values[i + 4]);
    store16(to + 16, bytes);
  } else if (output.element == Element::bfloat16) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) {
      bytes.words[i] = to_bfloat16(values[2 * i]) | uint32_t(to_bfloat16(values[2 * i + 1])) << 16;
    }
    store16(to, bytes);
  } else {
    FASTGUIDE_UNROLL
    for (int i = 0; i < 4; ++i) {
      bytes.words[i] = to_float16(values[2 * i]) | uint32_t(to_float16(values[2 * i + 1])) << 16;
    }
    store16(to, bytes);
  }
}

// One element as it is stored: again, all tensors' loads come before the first value is made of one.
FASTGUIDE_INLINE uint32_t load_bits(const Input& input, int64_t sample, int64_t place) {
  const char* from = address(input, sample, place);
  if (input.element == Element::float32) return *reinterpret_cast<const uint32_t*>(from);
  return *reinterpret_cast<const uint16_t*>(from);
}

FASTGUIDE_INLINE float value_of(uint32_t bits, Element element) {
  if (element == Element::float32) return float_of(bits);
  return element == Element::bfloat16 ? from_bfloat16(uint16_t(bits)) : from_float16(uint16_t(bits));
}

FASTGUIDE_INLINE void store_one(float value, const Output& output, int64_t sample, int64_t place) {
  char* to = address(output, sample, place);
  if (output.element == Element::float32) {
    *reinterpret_cast<float*>(to) = value;
  } else {
    *reinterpret_cast<uint16_t*>(to) = output.element == Element::bfloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

}  // namespace fastguide
