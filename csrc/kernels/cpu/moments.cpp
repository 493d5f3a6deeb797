// The moments of a part of a sample: inner products and sums of its terms, which are p_0, each p_k - p_0 and, where
// weights are made of it, the sample itself.
//
// Compiled once for each instruction set. All add up in the same lanes and the same order, so that the bits do not
// depend on how a step is divided among threads; nor on the instruction set, but for the baseline, which has no fused
// multiply-adds.
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "kernels/cpu/convert.h"
#include "kernels/cpu/launch.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// Unrolls a loop over terms, without which their sums would be in memory.
#if defined(__clang__)
#define FASTGUIDE_OVER_TERMS _Pragma("unroll")
#else
#define FASTGUIDE_OVER_TERMS _Pragma("GCC unroll 16")
#endif

template <typename T>
using Register __attribute__((vector_size(kRegisterBytes))) = T;

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

// Of one part: the products of terms row by row, and then the terms themselves.
template <typename T, int terms>
struct Sums {
  Register<T> lanes[moments_of(terms)][kRegisters];
};

// Adds `count` elements, a multiple of kLanes. runs: the predictions, then the sample.
template <typename T, typename Stored, int terms, bool with_sample>
void add(const Stored* const* runs, int64_t count, Sums<T, terms>* sums) {
  Sums<T, terms> s = *sums;  // a copy, which the compiler keeps in registers
  const Stored* from[terms];
  FASTGUIDE_OVER_TERMS
  for (int k = 0; k < terms; ++k) from[k] = runs[k];
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    FASTGUIDE_OVER_TERMS
    for (int r = 0; r < kRegisters; ++r) {
      Register<T> t[terms];
      FASTGUIDE_OVER_TERMS
      for (int k = 0; k < terms; ++k) t[k] = register_of(from[k] + i + r * (kLanes<T> / kRegisters));
      FASTGUIDE_OVER_TERMS
      for (int k = 1; k < terms - with_sample; ++k) t[k] -= t[0];
      int n = 0;
      FASTGUIDE_OVER_TERMS
      for (int a = 0; a < terms; ++a) {
        FASTGUIDE_OVER_TERMS
        for (int b = a; b < terms; ++b) add_product<T>(t[a], t[b], &s.lanes[n++][r]);
      }
      FASTGUIDE_OVER_TERMS
      for (int k = 0; k < terms; ++k) s.lanes[n++][r] += t[k];
    }
  }
  *sums = s;
}

// Adds the lanes up by halves, in double.
template <typename T>
double total_of(const Register<T>* registers) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, registers, sizeof lanes);
  double values[kLanes<T>];
  for (int k = 0; k < kLanes<T>; ++k) values[k] = double(lanes[k]);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) values[k] += values[k + half];
  }
  return values[0];
}

FASTGUIDE_INLINE const Input& term_of(const StepArguments& a, int k) {
  return k < a.num_predictions ? a.predictions[k] : a.sample;
}

// Stored: what all terms are stored as; or T, into which they are converted where they are anything else.
template <typename T, typename Stored, int terms, bool with_sample>
void moments_of_part(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, double* moments) {
  Sums<T, terms> sums{};
  alignas(64) Stored scratch[terms][kBlock];
  bool in_place = true;
  for (int k = 0; k < terms; ++k)
    in_place = in_place && (sizeof(T) != sizeof(Stored) || stored_as<T>(term_of(a, k).element));
  const int64_t size = in_place ? count : kBlock;
  for (int64_t offset = 0; offset < count; offset += size) {
    const int64_t here = count - offset < size ? count - offset : size, whole = here / kLanes<T> * kLanes<T>;
    const Stored* runs[terms];
    for (int k = 0; k < terms; ++k) {
      const Input& term = term_of(a, k);
      const int64_t first = sample * term.batch_stride + begin + offset;
      if constexpr (sizeof(T) == sizeof(Stored)) {
        runs[k] = load(term, first, here, scratch[k]);
      } else {
        runs[k] = static_cast<const Stored*>(term.data) + first;
      }
    }
    add<T, Stored, terms, with_sample>(runs, whole, &sums);
    if (whole == here) continue;
    alignas(64) Stored rest[terms][kLanes<T>] = {};  // what is added of zeros is zero
    for (int k = 0; k < terms; ++k) {
      std::memcpy(rest[k], runs[k] + whole, size_t(here - whole) * sizeof(Stored));
      runs[k] = rest[k];
    }
    add<T, Stored, terms, with_sample>(runs, kLanes<T>, &sums);
  }
  for (int n = 0; n < moments_of(terms); ++n) moments[n] = total_of<T>(sums.lanes[n]);
}

using PartMoments = void (*)(const StepArguments&, int64_t, int64_t, int64_t, double*);

template <typename T, typename Stored, bool with_sample>
PartMoments choose_moments(int terms) {
  static constexpr PartMoments kMoments[kMaxTerms - 1] = {
      moments_of_part<T, Stored, 2, with_sample>,
      moments_of_part<T, Stored, 3, with_sample>,
      moments_of_part<T, Stored, 4, with_sample>,
  };
  return kMoments[terms - 2];
}

PartMoments choose_moments(const StepArguments& a) {
  const int terms = terms_of(a);
  if constexpr (kHasDouble) {
    if (a.double_precision) {
      return a.weighs_sample ? choose_moments<double, double, true>(terms)
                             : choose_moments<double, double, false>(terms);
    }
  }
  if (a.weighs_sample) return choose_moments<float, float, true>(terms);
#if defined(__AVX2__)
  bool all_bfloat16 = true;
  for (int k = 0; k < terms; ++k) all_bfloat16 = all_bfloat16 && a.predictions[k].element == Element::bfloat16;
  if (all_bfloat16) return choose_moments<float, uint16_t, false>(terms);  // converted in registers
#endif
  return choose_moments<float, float, false>(terms);
}

}  // namespace

void part_moments(const StepArguments& a, int64_t sample, int64_t part, double* moments) {
  const int64_t begin = part * kPart, left = a.elements_per_sample - begin;
  choose_moments(a)(a, sample, begin, left < kPart ? left : kPart, moments);
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
