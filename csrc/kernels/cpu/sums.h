// Sums of products of terms, in lanes of vector registers: what moments are made of.
//
// Part of moments.cpp, and compiled with it for each instruction set: all add up in the same lanes and the same order.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "kernels/cpu/registers.h"
#include "kernels/cpu/stream.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

// Unrolls a loop over terms, without which their sums would be in memory.
#if defined(__clang__)
#define FASTGUIDE_OVER_TERMS _Pragma("unroll")
#else
#define FASTGUIDE_OVER_TERMS _Pragma("GCC unroll 16")
#endif

// Sums of elements so far apart: 64 bytes, in one or several registers.
constexpr int kRegisters = 64 / kRegisterBytes;
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <typename T>
FASTGUIDE_INLINE Register<T> register_of(const T* from) {
  Register<T> values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

#if defined(__AVX512F__)
FASTGUIDE_INLINE Register<float> register_of(const uint16_t* bfloat16) {
  const __m512i wide =
      _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16)));
  return (Register<float>)_mm512_maskz_slli_epi32(0xFFFF, wide, 16);
}
#elif defined(__AVX2__)
FASTGUIDE_INLINE Register<float> register_of(const uint16_t* bfloat16) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bfloat16)));
  return (Register<float>)_mm256_slli_epi32(wide, 16);
}
#endif

template <typename T>
FASTGUIDE_INLINE void add_product(const Register<T>& a, const Register<T>& b, Register<T>* sum) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    *sum = (Register<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)*sum);
  } else {
    *sum = (Register<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)*sum);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(T) == sizeof(float)) {
    *sum = (Register<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)*sum);
  } else {
    *sum = (Register<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)*sum);
  }
#else
  *sum += a * b;
#endif
}

// Of one part: the products of terms row by row, and then, unless nobody reads these, the terms themselves.
template <typename T, int terms>
struct Sums {
  Register<T> lanes[moments_of(terms)][kRegisters];
};

// Where the predictions are in no cache, their elements are fetched so far ahead.
constexpr int64_t kAhead = 512;

// Adds `count` elements, a multiple of kLanes, to the sums of each of some parts that follow each other. runs: the
// predictions of the first part, then its sample.
template <typename T, typename Stored, int terms, bool with_sample, bool with_sums, int parts>
void add(const Stored* const* runs, int64_t count, bool fetches, Sums<T, terms>* sums) {
  Sums<T, terms> s[parts];  // copies, which the compiler keeps in registers
  FASTGUIDE_OVER_TERMS
  for (int part = 0; part < parts; ++part) s[part] = sums[part];
  const Stored* from[terms];
  FASTGUIDE_OVER_TERMS
  for (int k = 0; k < terms; ++k) from[k] = runs[k];
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    if (fetches) {
      FASTGUIDE_OVER_TERMS
      for (int part = 0; part < parts; ++part) {
        FASTGUIDE_OVER_TERMS
        for (int k = 0; k < terms; ++k) fetch(from[k] + part * kPart + i, kAhead * sizeof(Stored));
      }
    }
    FASTGUIDE_OVER_TERMS
    for (int part = 0; part < parts; ++part) {
      FASTGUIDE_OVER_TERMS
      for (int r = 0; r < kRegisters; ++r) {
        Register<T> t[terms];
        FASTGUIDE_OVER_TERMS
        for (int k = 0; k < terms; ++k) t[k] = register_of(from[k] + part * kPart + i + r * (kLanes<T> / kRegisters));
        FASTGUIDE_OVER_TERMS
        for (int k = 1; k < terms - with_sample; ++k) t[k] -= t[0];
        int n = 0;
        FASTGUIDE_OVER_TERMS
        for (int a = 0; a < terms; ++a) {
          FASTGUIDE_OVER_TERMS
          for (int b = a; b < terms; ++b) add_product<T>(t[a], t[b], &s[part].lanes[n++][r]);
        }
        FASTGUIDE_OVER_TERMS
        for (int k = 0; k < terms && with_sums; ++k) s[part].lanes[n++][r] += t[k];
      }
    }
  }
  FASTGUIDE_OVER_TERMS
  for (int part = 0; part < parts; ++part) sums[part] = s[part];
}

template <typename T, int count>
using Several __attribute__((vector_size(count * sizeof(T)))) = T;

// Adds the lanes up by halves, in double.
template <typename T>
__attribute__((noinline)) double total_of(const Register<T>* registers) {
  alignas(64) T lanes[kLanes<T>];
  std::memcpy(lanes, registers, sizeof lanes);
  Several<double, 8> eight;
  if constexpr (sizeof(T) == sizeof(float)) {
    Several<float, 8> low, high;
    std::memcpy(&low, lanes, sizeof low);
    std::memcpy(&high, lanes + 8, sizeof high);
    eight = __builtin_convertvector(low, Several<double, 8>) + __builtin_convertvector(high, Several<double, 8>);
  } else {
    std::memcpy(&eight, lanes, sizeof eight);
  }
  Several<double, 4> halves[2];
  std::memcpy(halves, &eight, sizeof halves);
  const Several<double, 4> four = halves[0] + halves[1];
  Several<double, 2> quarters[2];
  std::memcpy(quarters, &four, sizeof quarters);
  const Several<double, 2> two = quarters[0] + quarters[1];
  return two[0] + two[1];
}

}  // namespace
}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
