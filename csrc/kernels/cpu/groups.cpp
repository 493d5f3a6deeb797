// The guided prediction of a sample whose groups of elements, such as tokens, have weights of their own.
//
// Moments and weights are in double, and so is m of a group whose terms nearly cancel: what is left of them is then
// divided by its norm, and a float would have lost most of its digits.
//
// Compiled once for each instruction set; the compiler vectorises the loops. Groups are mostly short and many: their
// programs are run for several at once. What a group gets depends on no other.
#include "kernels/cpu/convert.h"
#include "kernels/cpu/launch.h"
#include "kernels/cpu/loops.h"
#include "kernels/cursor.h"
#include "kernels/weights.h"
#include "maths/program.h"
#include "maths/step.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

// Whose weights are made at once: the compiler unrolls a loop over 16 before it vectorises it, and then it does not.
constexpr int kGroups = 32;

template <typename T, typename Stored>
FASTGUIDE_INLINE T value_of(Stored stored) {
  if constexpr (sizeof(Stored) == sizeof(uint16_t)) return T(from_bfloat16(stored));
  if constexpr (sizeof(Stored) != sizeof(uint16_t)) return T(stored);
}

// Whether the terms of m, w_0 p_0 and w_1 (p_1 - p_0), cancel but for less than half of their length. products: of p_0
// and p_1 - p_0.
FASTGUIDE_INLINE bool nearly_cancel(double w0, double w1, double p00, double p01, double p11) {
  const double of_terms = w0 * w0 * p00 + w1 * w1 * p11;
  return !(4 * (of_terms + 2 * w0 * w1 * p01) >= of_terms);
}

template <typename T, typename Between, typename Stored>
FASTGUIDE_INLINE void combine_pair(const PairWeights<Between>& pair, const Stored* p0, const Stored* p1, int64_t size,
                                   T* m) {
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < size; ++i) {
    m[i] = T(guided_prediction(pair, value_of<Between>(p0[i]), value_of<Between>(p1[i])));
  }
}

// Writes m of a range of one group. products: of p_0 and p_1 - p_0, so far apart.
template <typename T, typename Stored>
FASTGUIDE_INLINE void combine_pair(const double* weights, const double* products, int apart, const Stored* p0,
                                   const Stored* p1, int64_t count, T* m) {
  if (nearly_cancel(weights[0], weights[1], products[0], products[apart], products[2 * apart])) {
    combine_pair(PairWeights<double>{weights[0], weights[1]}, p0, p1, count, m);
  } else {
    combine_pair(PairWeights<T>{T(weights[0]), T(weights[1])}, p0, p1, count, m);
  }
}

// Writes m of some groups of two predictions that are stored alike, with nothing beside them, the first of which is at
// the sample's element `begin`. The products of the groups follow each other, and those of one are so far apart.
template <typename T, typename Stored>
void combine_pairs(const StepArguments& a, const double* weights, const double* products, int apart, int64_t sample,
                   int64_t begin, int64_t size, int count, T* m) {
  const auto at = [&](const Input& input) {
    return static_cast<const Stored*>(input.data) + sample * input.batch_stride + begin;
  };
  const Stored *p0 = at(a.predictions[0]), *p1 = at(a.predictions[1]);
  for (int k = 0; k < count; ++k, p0 += size, p1 += size, m += size, weights += made_columns(a)) {
    combine_pair(weights, products + k, apart, p0, p1, size, m);
  }
}

template <typename T>
using CombinePairs = void (*)(const StepArguments&, const double*, const double*, int, int64_t, int64_t, int64_t, int,
                              T*);

// Returns null where predictions are stored otherwise, more than two, or the sample has a weight.
template <typename T>
CombinePairs<T> choose_pairs(const StepArguments& a) {
  const Element element = a.predictions[0].element;
  if (a.num_predictions != 2 || a.weighs_sample || a.predictions[1].element != element) return nullptr;
  if (stored_as<T>(element)) return combine_pairs<T, T>;
  return element == Element::bfloat16 && sizeof(T) == sizeof(float) ? combine_pairs<T, uint16_t> : nullptr;
}

template <typename T>
const RunFunctions<T>& runs() {
  if constexpr (sizeof(T) == sizeof(float)) return float_runs();
  if constexpr (sizeof(T) != sizeof(float)) return double_runs();
}

// The same of any terms, whose products are so far apart.
bool nearly_cancel(const StepArguments& a, const double* weights, const double* products, int apart) {
  double w[kMaxTerms], of_terms = 0, between = 0;
  const int terms = terms_of(a);
  for (int i = 0; i < terms; ++i) w[i] = weights[i < a.num_predictions ? i : i + 1];
  for (int i = 0, n = 0; i < terms; ++i) {
    of_terms += w[i] * w[i] * products[apart * n++];
    for (int j = i + 1; j < terms; ++j) between += w[i] * w[j] * products[apart * n++];
  }
  return !(4 * (of_terms + 2 * between) >= of_terms);
}

// Writes m of `count` elements of one group, from the sample's element `begin` on, computed as Between.
template <typename T, typename Between>
void combine_group_as(const StepArguments& a, const double* made, int64_t sample, int64_t begin, int64_t count, T* m) {
  const RunFunctions<Between>& run = runs<Between>();
  Between weights[kMaxTerms + 1], sum[kBlock], scratch[kBlock];
  for (int n = 0; n < made_columns(a); ++n) weights[n] = Between(made[n]);
  for (int64_t done = 0; done < count; done += kBlock, m += kBlock) {
    const int64_t first = begin + done, here = count - done < kBlock ? count - done : kBlock;
    run.guided(a, weights, sample, first, here, sum);
    if (a.weighs_sample) {
      const Between* x = run.load(a.sample, sample, first, here, scratch);
      run.sum_of_two(weights[a.num_predictions + 1], x, Between(1), sum, here, sum);
    }
    for (int64_t i = 0; i < here; ++i) m[i] = T(sum[i]);
  }
}

template <typename T>
void combine_group(const StepArguments& a, const double* made, const double* products, int apart, int64_t sample,
                   int64_t begin, int64_t count, T* m) {
  if (nearly_cancel(a, made, products, apart)) {
    combine_group_as<T, double>(a, made, sample, begin, count, m);
  } else {
    combine_group_as<T, T>(a, made, sample, begin, count, m);
  }
}

template <typename T>
void guide(const StepArguments& a, int64_t sample, int64_t first, int64_t count, T* weights, T* m) {
  const Position position = position_of(a, sample);
  const int32_t* program = program_of(a, sample);
  const int64_t size = a.elements_per_sample / a.groups;
  const int wanted = moments_read(program, terms_of(a)), columns = made_columns(a);
  const CombinePairs<T> combine = choose_pairs<T>(a);
  double values[kMaxValues][kGroups];  // the n-th of the k-th group
  for (int64_t done = 0; done < count; done += kGroups) {
    const int here = int(count - done < kGroups ? count - done : kGroups);
    double moments[kGroups][kMostMoments];
    group_moments(a, sample, first + done, here, wanted, moments[0]);
    for (int n = 0; n < wanted; ++n) {
      for (int k = 0; k < kGroups; ++k) values[n][k] = moments[k < here ? k : 0][n];
    }
    double made[kGroups * (kMaxTerms + 1)];
    make_weights<T, kGroups>(a, program, sample, position, values, here, made);
    for (int n = 0; n < here * columns; ++n) weights[done * columns + n] = T(made[n]);
    if (combine != nullptr) {
      combine(a, made, values[0], kGroups, sample, (first + done) * size, size, here, m + done * size);
      continue;
    }
    for (int k = 0; k < here; ++k) {
      const double* of_group = made + k * columns;
      const int64_t begin = (first + done + k) * size;
      T* to = m + (done + k) * size;
      combine_group(a, of_group, values[0] + k, kGroups, sample, begin, size, to);
    }
  }
}

template <typename T>
void guide_part(const StepArguments& a, const double* made, const double* products, int64_t sample, int64_t begin,
                int64_t count, T* m) {
  if (const CombinePairs<T> combine = choose_pairs<T>(a)) {
    combine(a, made, products, 1, sample, begin, count, 1, m);
  } else {
    combine_group(a, made, products, 1, sample, begin, count, m);
  }
}

}  // namespace

void guide_groups(const StepArguments& a, int64_t sample, int64_t first, int64_t count, void* weights, void* m) {
  if constexpr (kHasDouble) {
    if (a.double_precision) {
      return guide(a, sample, first, count, static_cast<double*>(weights), static_cast<double*>(m));
    }
  }
  guide(a, sample, first, count, static_cast<float*>(weights), static_cast<float*>(m));
}

void guide_group_part(const StepArguments& a, const double* made, const double* moments, int64_t sample, int64_t begin,
                      int64_t count, void* m) {
  if constexpr (kHasDouble) {
    if (a.double_precision) {
      return guide_part(a, made, moments, sample, begin, count, static_cast<double*>(m));
    }
  }
  guide_part(a, made, moments, sample, begin, count, static_cast<float*>(m));
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
