// The moments of a part of a sample: inner products and sums of its terms, which are p_0, each p_k - p_0 and, where
// weights are made of it, the sample itself.
//
// Compiled once for each instruction set. All add up in the same lanes and the same order, so that the bits do not
// depend on how a step is divided among threads; nor on the instruction set, but for the baseline, which has no fused
// multiply-adds.
#include <cmath>
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

template <typename T, int count>
using Several __attribute__((vector_size(count * sizeof(T)))) = T;

// Adds the lanes up by halves, in double.
template <typename T>
double total_of(const Register<T>* registers) {
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

FASTGUIDE_INLINE const Input& term_of(const StepArguments& a, int k) {
  return k < a.num_predictions ? a.predictions[k] : a.sample;
}

// Writes the first `wanted` of the moments. Stored: what all terms are stored as; or T, into which they are converted
// where they are anything else.
template <typename T, typename Stored, int terms, bool with_sample>
void moments_of_part(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, int wanted,
                     double* moments) {
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
  for (int n = 0; n < wanted; ++n) moments[n] = total_of<T>(sums.lanes[n]);
}

using PartMoments = void (*)(const StepArguments&, int64_t, int64_t, int64_t, int, double*);

template <typename T, typename Stored, bool with_sample>
PartMoments choose_moments(int terms) {
  static constexpr PartMoments kMoments[kMaxTerms - 1] = {
      moments_of_part<T, Stored, 2, with_sample>,
      moments_of_part<T, Stored, 3, with_sample>,
      moments_of_part<T, Stored, 4, with_sample>,
  };
  return kMoments[terms - 2];
}

PartMoments choose_double_moments(const StepArguments& a) {
  const int terms = terms_of(a);
  return a.weighs_sample ? choose_moments<double, double, true>(terms) : choose_moments<double, double, false>(terms);
}

PartMoments choose_moments(const StepArguments& a) {
  const int terms = terms_of(a);
  if constexpr (kHasDouble) {
    if (a.double_precision) return choose_double_moments(a);
  }
  if (a.weighs_sample) return choose_moments<float, float, true>(terms);
#if defined(__AVX2__)
  bool all_bfloat16 = true;
  for (int k = 0; k < terms; ++k) all_bfloat16 = all_bfloat16 && a.predictions[k].element == Element::bfloat16;
  if (all_bfloat16) return choose_moments<float, uint16_t, false>(terms);  // converted in registers
#endif
  return choose_moments<float, float, false>(terms);
}

// ---- Groups ----

constexpr int kPairProducts = 3;  // of two predictions: what norms and inner products are made of

bool are_stored_as(const StepArguments& a, Element element) {
  return a.predictions[0].element == element && a.predictions[1].element == element;
}

// Adds the lanes up by halves: in float, as they are few.
FASTGUIDE_INLINE double total_of_few(const Register<float>* registers) {
  Several<float, 8> eights[2];
  std::memcpy(eights, registers, sizeof eights);
  const Several<float, 8> eight = eights[0] + eights[1];
  Several<float, 4> fours[2];
  std::memcpy(fours, &eight, sizeof fours);
  const Several<float, 4> four = fours[0] + fours[1];
  return double((four[0] + four[2]) + (four[1] + four[3]));
}

FASTGUIDE_INLINE double total_of_few(const Register<double>* registers) { return total_of<double>(registers); }

#if defined(__AVX512F__)  // masked with all ones, because g++ 12 warns about the others
FASTGUIDE_INLINE Register<double> doubles_of(const float* from) {
  return (Register<double>)_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(from));
}

FASTGUIDE_INLINE Register<double> doubles_of(const uint16_t* bfloat16) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bfloat16)));
  return (Register<double>)_mm512_maskz_cvtps_pd(0xFF, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
#elif defined(__AVX2__)
FASTGUIDE_INLINE Register<double> doubles_of(const float* from) {
  return (Register<double>)_mm256_cvtps_pd(_mm_loadu_ps(from));
}

FASTGUIDE_INLINE Register<double> doubles_of(const uint16_t* bfloat16) {
  const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bfloat16)));
  return (Register<double>)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
}
#else
FASTGUIDE_INLINE Register<double> doubles_of(const float* from) {
  Several<float, kRegisterBytes / sizeof(double)> values;
  std::memcpy(&values, from, sizeof values);
  return __builtin_convertvector(values, Register<double>);
}
#endif

template <typename T, typename Stored>
FASTGUIDE_INLINE Register<T> loaded(const Stored* from) {
  if constexpr (sizeof(T) == sizeof(float)) return register_of(from);
  if constexpr (sizeof(T) != sizeof(float)) return doubles_of(from);
}

// Adds `count` elements, a multiple of kLanes.
template <typename T, typename Stored>
FASTGUIDE_INLINE void add_products(const Stored* p0, const Stored* p1, int64_t count,
                                   Register<T> (&sums)[kPairProducts][kRegisters]) {
  constexpr int64_t kEach = kRegisterBytes / sizeof(T);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    FASTGUIDE_OVER_TERMS
    for (int r = 0; r < kRegisters; ++r) {
      const Register<T> base = loaded<T>(p0 + i + r * kEach), difference = loaded<T>(p1 + i + r * kEach) - base;
      add_product<T>(base, base, &sums[0][r]);
      add_product<T>(base, difference, &sums[1][r]);
      add_product<T>(difference, difference, &sums[2][r]);
    }
  }
}

// Writes the products of p_0 and p_1 - p_0 of one group.
template <typename T, typename Stored>
FASTGUIDE_INLINE void pair_products(const Stored* p0, const Stored* p1, int64_t size, double* moments) {
  const int64_t whole = size / kLanes<T> * kLanes<T>;
  Register<T> sums[kPairProducts][kRegisters] = {};
  add_products<T>(p0, p1, whole, sums);
  if (whole < size) {
    alignas(64) Stored rest[2][kLanes<T>] = {};  // what is added of zeros is zero
    std::memcpy(rest[0], p0 + whole, size_t(size - whole) * sizeof(Stored));
    std::memcpy(rest[1], p1 + whole, size_t(size - whole) * sizeof(Stored));
    add_products<T>(rest[0], rest[1], kLanes<T>, sums);
  }
  FASTGUIDE_OVER_TERMS
  for (int n = 0; n < kPairProducts; ++n) moments[n] = total_of_few(sums[n]);
}

// Whether every vector over p_0 and p_1 - p_0 is at least half as long as its terms: the cosine of these is below 3/4.
FASTGUIDE_INLINE bool keep_apart(const double* products) {
  return 16 * products[1] * products[1] < 9 * products[0] * products[2];
}

// Writes the products of each of some groups, which are many and short: nothing but these. Added up in float where no
// vector is much shorter than its terms, and else in double: what nearly cancels is divided by.
template <typename Stored>
void products_of_pairs(const StepArguments& a, int64_t sample, int64_t first, int64_t groups, int64_t size,
                       double* moments) {
  const auto at = [&](const Input& input) {
    return static_cast<const Stored*>(input.data) + sample * input.batch_stride + first * size;
  };
  const Stored *p0 = at(a.predictions[0]), *p1 = at(a.predictions[1]);
  const bool in_float = size >= kLanes<float> && size <= kPart;
  for (int64_t k = 0; k < groups; ++k, p0 += size, p1 += size, moments += kMostMoments) {
    if (in_float) {
      pair_products<float>(p0, p1, size, moments);
      if (keep_apart(moments)) continue;
    }
    pair_products<double>(p0, p1, size, moments);
  }
}

// The same of any terms: whether the cosines of each to all others, and to a constant where sums are read, are below
// 3/4 together (Gershgorin's bound of the least eigenvalue of their matrix).
bool keep_apart(const double* moments, int terms, bool with_sums, double numel) {
  double inverse[kMaxTerms + 1], cosines[kMaxTerms + 1] = {};
  const double* of_row = moments;
  for (int i = 0; i < terms; of_row += terms - i, ++i) inverse[i] = 1 / std::sqrt(of_row[0]);
  inverse[terms] = 1 / std::sqrt(numel);
  const auto count = [&](int i, int j, double product) {
    const double cosine = std::fabs(product) * inverse[i] * inverse[j];
    cosines[i] += cosine;
    cosines[j] += cosine;
  };
  of_row = moments;
  for (int i = 0; i < terms; of_row += terms - i, ++i) {
    for (int j = i + 1; j < terms; ++j) count(i, j, of_row[j - i]);
  }
  for (int i = 0; i < terms && with_sums; ++i) count(i, terms, of_row[i]);
  bool apart = true;
  for (int i = 0; i <= terms; ++i) apart = apart && cosines[i] < 0.75;
  return apart;
}

// Writes the moments of one group, added up in float, in parts as a sample's, where these are far from cancelling.
// Returns false where they are not, or there is nothing to gain.
bool float_moments(const StepArguments& a, const PartMoments& add, int64_t sample, int64_t begin, int64_t size,
                   int wanted, double* moments) {
  if (a.double_precision || size < kLanes<float>) return false;
  add(a, sample, begin, size < kPart ? size : kPart, wanted, moments);
  for (int64_t done = kPart; done < size; done += kPart) {
    double part[kMostMoments];
    add(a, sample, begin + done, size - done < kPart ? size - done : kPart, wanted, part);
    for (int n = 0; n < wanted; ++n) moments[n] += part[n];
  }
  if (wanted == kPairProducts) return keep_apart(moments);
  return keep_apart(moments, terms_of(a), wanted == moments_of(terms_of(a)), double(size));
}

}  // namespace

void part_moments(const StepArguments& a, int64_t sample, int64_t part, double* moments) {
  const int64_t begin = part * kPart, left = a.elements_per_sample - begin;
  choose_moments(a)(a, sample, begin, left < kPart ? left : kPart, moments_of(terms_of(a)), moments);
}

void group_moments(const StepArguments& a, int64_t sample, int64_t first, int64_t groups, int wanted, double* moments) {
  const int64_t size = a.elements_per_sample / a.groups;
  if (a.num_predictions == 2 && wanted == kPairProducts) {
    if (are_stored_as(a, Element::float32)) return products_of_pairs<float>(a, sample, first, groups, size, moments);
#if defined(__AVX2__)
    if (are_stored_as(a, Element::bfloat16)) {
      return products_of_pairs<uint16_t>(a, sample, first, groups, size, moments);
    }
#endif
  }
  const PartMoments add = choose_moments(a);
  for (int64_t k = 0; k < groups; ++k, moments += kMostMoments) {
    const int64_t begin = (first + k) * size;
    if (float_moments(a, add, sample, begin, size, wanted, moments)) continue;
    if constexpr (kHasDouble) {
      choose_double_moments(a)(a, sample, begin, size, wanted, moments);
    } else {
      baseline::group_moments(a, sample, first + k, 1, wanted, moments);
    }
  }
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
