// The moments of parts of a sample: inner products and sums of its terms, which are p_0, each p_k - p_0 and, where
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
#include "kernels/cpu/stream.h"
#include "kernels/cpu/sums.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

FASTGUIDE_INLINE const Input& term_of(const StepArguments& a, int k) {
  return k < a.num_predictions ? a.predictions[k] : a.sample;
}

// Whether all terms are used where they are.
template <typename T, typename Stored>
bool are_in_place(const StepArguments& a) {
  bool in_place = true;
  for (int k = 0; k < terms_of(a); ++k)
    in_place = in_place && (sizeof(T) != sizeof(Stored) || stored_as<T>(term_of(a, k).element));
  return in_place;
}

// This is a call because conversions of four dtypes would be inlined a dozen times.
template <typename T>
__attribute__((noinline)) const T* load_term(const Input& term, int64_t first, int64_t count, T* scratch) {
  return load(term, first, count, scratch);
}

// Writes the moments of some elements, but no sums unless they are asked for. Stored: what all terms are stored as; or
// T, into which they are converted where they are anything else.
template <typename T, typename Stored, int terms, bool with_sample, bool with_sums>
void moments_of_part(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, double* moments) {
  Sums<T, terms> sums{};
  alignas(64) Stored scratch[terms][kBlock];
  const bool in_place = are_in_place<T, Stored>(a), fetches = in_place && are_large(a);
  const int64_t size = in_place ? count : kBlock;
  for (int64_t offset = 0; offset < count; offset += size) {
    const int64_t here = count - offset < size ? count - offset : size, whole = here / kLanes<T> * kLanes<T>;
    const Stored* runs[terms];
    for (int k = 0; k < terms; ++k) {
      const Input& term = term_of(a, k);
      const int64_t first = sample * term.batch_stride + begin + offset;
      if constexpr (sizeof(T) == sizeof(Stored)) {
        runs[k] = load_term(term, first, here, scratch[k]);
      } else {
        runs[k] = static_cast<const Stored*>(term.data) + first;
      }
    }
    add<T, Stored, terms, with_sample, with_sums, 1>(runs, whole, fetches, &sums);
    if (whole == here) continue;
    alignas(64) Stored rest[terms][kLanes<T>] = {};  // what is added of zeros is zero
    for (int k = 0; k < terms; ++k) {
      std::memcpy(rest[k], runs[k] + whole, size_t(here - whole) * sizeof(Stored));
      runs[k] = rest[k];
    }
    add<T, Stored, terms, with_sample, with_sums, 1>(runs, kLanes<T>, false, &sums);
  }
  for (int n = 0; n < moments_of(terms) - (with_sums ? 0 : terms); ++n) moments[n] = total_of<T>(sums.lanes[n]);
}

using PartMoments = void (*)(const StepArguments&, int64_t, int64_t, int64_t, double*);

#if defined(__AVX2__)
constexpr bool kLeavesSumsOut = true;
#else
constexpr bool kLeavesSumsOut = false;  // smaller rather than faster
#endif

// Sums that nobody reads are left out of the moments of two predictions; of more terms, all are added up.
template <typename T, typename Stored, bool with_sample>
PartMoments choose_moments(int terms, bool with_sums) {
  static constexpr PartMoments kMoments[kMaxTerms] = {
      moments_of_part < T,
      Stored,
      2,
      with_sample,
      with_sample || !kLeavesSumsOut >,
      moments_of_part<T, Stored, 2, with_sample, true>,
      moments_of_part<T, Stored, 3, with_sample, true>,
      moments_of_part<T, Stored, 4, with_sample, true>,
  };
  return kMoments[terms > 2 || with_sums ? terms - 1 : 0];
}

PartMoments choose_double_moments(const StepArguments& a) {
  const int terms = terms_of(a);
  return a.weighs_sample ? choose_moments<double, double, true>(terms, true)
                         : choose_moments<double, double, false>(terms, true);
}

#if defined(__AVX2__)
bool are_all_bfloat16(const StepArguments& a) {  // and converted in registers
  bool all = !a.weighs_sample;
  for (int k = 0; k < a.num_predictions; ++k) all = all && a.predictions[k].element == Element::bfloat16;
  return all;
}
#endif

PartMoments choose_moments(const StepArguments& a, bool with_sums) {
  const int terms = terms_of(a);
  if constexpr (kHasDouble) {
    if (a.double_precision) return choose_double_moments(a);
  }
  if (a.weighs_sample) return choose_moments<float, float, true>(terms, true);
#if defined(__AVX2__)
  if (are_all_bfloat16(a)) return choose_moments<float, uint16_t, false>(terms, with_sums);
#endif
  return choose_moments<float, float, false>(terms, with_sums);
}

// ---- Parts ----

#if defined(__AVX512F__)
constexpr int kTogether = 2;

// Writes the moments of parts of two predictions, as many as are added up together: one part's sums, each of which
// waits for its last addition, would take half as long again.
template <typename Stored, bool with_sums>
void moments_together(const StepArguments& a, int64_t sample, int64_t begin, double* moments) {
  Sums<float, 2> sums[kTogether]{};
  const Stored* runs[2];
  for (int k = 0; k < 2; ++k) {
    runs[k] = static_cast<const Stored*>(a.predictions[k].data) + sample * a.predictions[k].batch_stride + begin;
  }
  add<float, Stored, 2, false, with_sums, kTogether>(runs, kPart, are_large(a), sums);
  for (int part = 0; part < kTogether; ++part, moments += moments_of(2)) {
    for (int n = 0; n < moments_of(2) - (with_sums ? 0 : 2); ++n) moments[n] = total_of<float>(sums[part].lanes[n]);
  }
}

using TogetherMoments = void (*)(const StepArguments&, int64_t, int64_t, double*);

// Returns null where parts are added up one by one.
TogetherMoments choose_together(const StepArguments& a, bool with_sums) {
  if (a.double_precision || a.weighs_sample || a.num_predictions != 2) return nullptr;
  if (are_all_bfloat16(a)) return with_sums ? moments_together<uint16_t, true> : moments_together<uint16_t, false>;
  if (!are_in_place<float, float>(a)) return nullptr;
  return with_sums ? moments_together<float, true> : moments_together<float, false>;
}
#endif

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

// Adds `count` elements, a multiple of kLanes, to the products alone or to the sums as well.
template <typename T, typename Stored, int moments>
FASTGUIDE_INLINE void add_pair_moments(const Stored* p0, const Stored* p1, int64_t count,
                                       Register<T> (&sums)[moments][kRegisters]) {
  constexpr int64_t kEach = kRegisterBytes / sizeof(T);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    FASTGUIDE_OVER_TERMS
    for (int r = 0; r < kRegisters; ++r) {
      const Register<T> base = loaded<T>(p0 + i + r * kEach), difference = loaded<T>(p1 + i + r * kEach) - base;
      add_product<T>(base, base, &sums[0][r]);
      add_product<T>(base, difference, &sums[1][r]);
      add_product<T>(difference, difference, &sums[2][r]);
      if constexpr (moments > kPairProducts) {
        sums[kPairProducts][r] += base;
        sums[kPairProducts + 1][r] += difference;
      }
    }
  }
}

// Writes the moments of p_0 and p_1 - p_0 of one group: the products alone, or all of them.
template <typename T, typename Stored, int count = kPairProducts>
FASTGUIDE_INLINE void pair_moments(const Stored* p0, const Stored* p1, int64_t size, double* moments) {
  const int64_t whole = size / kLanes<T> * kLanes<T>;
  Register<T> sums[count][kRegisters] = {};
  add_pair_moments<T>(p0, p1, whole, sums);
  if (whole < size) {
    alignas(64) Stored rest[2][kLanes<T>] = {};  // what is added of zeros is zero
    std::memcpy(rest[0], p0 + whole, size_t(size - whole) * sizeof(Stored));
    std::memcpy(rest[1], p1 + whole, size_t(size - whole) * sizeof(Stored));
    add_pair_moments<T>(rest[0], rest[1], kLanes<T>, sums);
  }
  FASTGUIDE_OVER_TERMS
  for (int n = 0; n < count; ++n) moments[n] = total_of_few(sums[n]);
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
      pair_moments<float>(p0, p1, size, moments);
      if (keep_apart(moments)) continue;
    }
    pair_moments<double>(p0, p1, size, moments);
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

// Whether moments of a group that were added up in float are far from cancelling.
bool keep_apart(const StepArguments& a, const double* moments, int wanted) {
  if (wanted == kPairProducts) return keep_apart(moments);
  const double numel = double(a.elements_per_sample / a.groups);
  return keep_apart(moments, terms_of(a), wanted == moments_of(terms_of(a)), numel);
}

// Whether nothing but two predictions is weighed, which are read as they are stored.
bool are_pairs(const StepArguments& a) {
  if (a.num_predictions != 2 || a.weighs_sample) return false;
#if defined(__AVX2__)
  if (are_stored_as(a, Element::bfloat16)) return true;
#endif
  return are_stored_as(a, Element::float32);
}

// Whether their products alone are wanted.
bool are_pairs(const StepArguments& a, int wanted) { return wanted == kPairProducts && are_pairs(a); }

// Writes the moments of two predictions in a range, added up in double: all of them, or the products.
template <typename Stored>
void double_pair_moments(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, int wanted,
                         double* moments) {
  const auto at = [&](const Input& input) {
    return static_cast<const Stored*>(input.data) + sample * input.batch_stride + begin;
  };
  const Stored *p0 = at(a.predictions[0]), *p1 = at(a.predictions[1]);
  if (wanted == kPairProducts) return pair_moments<double>(p0, p1, count, moments);
  pair_moments<double, Stored, moments_of(2)>(p0, p1, count, moments);
}

// Writes the moments of a range, added up in double.
void double_moments(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, int wanted, double* moments) {
  if constexpr (kHasDouble) {
    choose_double_moments(a)(a, sample, begin, count, moments);
  } else {
    baseline::group_part_moments(a, sample, begin, count, wanted, true, moments);
  }
}

}  // namespace

void part_moments(const StepArguments& a, int64_t sample, int64_t first, int64_t count, double* moments) {
  const int terms = terms_of(a), all = moments_of(terms);
  const bool with_sums = moments_read(program_of(a, sample), terms) == all;
  int64_t begin = first * kPart;
  const int64_t last = begin + count * kPart, end = last < a.elements_per_sample ? last : a.elements_per_sample;
#if defined(__AVX512F__)
  if (const TogetherMoments together = choose_together(a, with_sums)) {
    for (; begin + kTogether * kPart <= end; begin += kTogether * kPart, moments += kTogether * all) {
      together(a, sample, begin, moments);
    }
  }
#endif
  const PartMoments add = choose_moments(a, with_sums);
  for (; begin < end; begin += kPart, moments += all) {
    add(a, sample, begin, end - begin < kPart ? end - begin : kPart, moments);
  }
}

void group_moments(const StepArguments& a, int64_t sample, int64_t first, int64_t groups, int wanted, double* moments) {
  const int64_t size = a.elements_per_sample / a.groups;
  if (are_pairs(a, wanted)) {
    if (are_stored_as(a, Element::float32)) return products_of_pairs<float>(a, sample, first, groups, size, moments);
#if defined(__AVX2__)
    return products_of_pairs<uint16_t>(a, sample, first, groups, size, moments);
#endif
  }
  const PartMoments add = choose_moments(a, wanted == moments_of(terms_of(a)));
  const bool in_float = !a.double_precision && size >= kLanes<float>;
  for (int64_t k = 0; k < groups; ++k, moments += kMostMoments) {
    const int64_t begin = (first + k) * size;
    if (in_float) {
      add(a, sample, begin, size, moments);
      if (keep_apart(a, moments, wanted)) continue;
    }
    double_moments(a, sample, begin, size, wanted, moments);
  }
}

void group_part_moments(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, int wanted, bool exactly,
                        double* moments) {
  if (exactly ? are_pairs(a) : are_pairs(a, wanted)) {
    if (are_stored_as(a, Element::float32)) return double_pair_moments<float>(a, sample, begin, count, wanted, moments);
#if defined(__AVX2__)
    return double_pair_moments<uint16_t>(a, sample, begin, count, wanted, moments);
#endif
  }
  if (exactly) return double_moments(a, sample, begin, count, wanted, moments);
  choose_moments(a, wanted == moments_of(terms_of(a)))(a, sample, begin, count, moments);
}

bool are_exact_enough(const StepArguments& a, int wanted, const double* moments) {
  return a.double_precision || are_pairs(a, wanted) || keep_apart(a, moments, wanted);
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
