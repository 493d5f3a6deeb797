// The guided prediction of a sample whose groups of elements, such as tokens, have weights of their own.
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

template <typename T>
FASTGUIDE_INLINE T value_of(T stored) {
  return stored;
}

template <typename T>
FASTGUIDE_INLINE T value_of(uint16_t bfloat16) {
  return T(from_bfloat16(bfloat16));
}

// Writes m of some groups of two predictions that are stored alike, with nothing beside them.
template <typename T, typename Stored>
void combine_pairs(const StepArguments& a, const T* weights, int64_t sample, int64_t first, int count, T* m) {
  const int64_t size = a.elements_per_sample / a.groups;
  const auto at = [&](const Input& input) {
    return static_cast<const Stored*>(input.data) + sample * input.batch_stride + first * size;
  };
  const Stored *p0 = at(a.predictions[0]), *p1 = at(a.predictions[1]);
  for (int k = 0; k < count; ++k, p0 += size, p1 += size, m += size, weights += made_columns(a)) {
    const PairWeights<T> pair{weights[0], weights[1]};
    FASTGUIDE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < size; ++i) m[i] = guided_prediction(pair, value_of<T>(p0[i]), value_of<T>(p1[i]));
  }
}

template <typename T>
using CombinePairs = void (*)(const StepArguments&, const T*, int64_t, int64_t, int, T*);

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

// Writes m of `count` elements of one group, from the sample's element `begin` on.
template <typename T>
void combine_group(const StepArguments& a, const RunFunctions<T>& run, const T* weights, int64_t sample, int64_t begin,
                   int64_t count, T* m) {
  for (int64_t done = 0; done < count; done += kBlock, m += kBlock) {
    const int64_t first = begin + done, here = count - done < kBlock ? count - done : kBlock;
    run.guided(a, weights, sample, first, here, m);
    if (!a.weighs_sample) continue;
    T scratch[kBlock];
    const T* x = run.load(a.sample, sample, first, here, scratch);
    run.sum_of_two(weights[a.num_predictions + 1], x, T(1), m, here, m);
  }
}

template <typename T>
void guide(const StepArguments& a, int64_t sample, int64_t first, int64_t count, T* weights, T* m) {
  const Position position = position_of(a, sample);
  const int32_t* program = program_of(a, sample);
  const int64_t size = a.elements_per_sample / a.groups;
  const int wanted = moments_read(program, terms_of(a)), columns = made_columns(a);
  const CombinePairs<T> combine = choose_pairs<T>(a);
  double values[kMaxValues][kGroups];
  for (int64_t done = 0; done < count; done += kGroups) {
    const int here = int(count - done < kGroups ? count - done : kGroups);
    double moments[kGroups][kMostMoments];
    group_moments(a, sample, first + done, here, wanted, moments[0]);
    for (int n = 0; n < wanted; ++n) {
      for (int k = 0; k < kGroups; ++k) values[n][k] = moments[k < here ? k : 0][n];
    }
    T* made = weights + done * columns;
    make_weights<T, kGroups>(a, program, sample, position, values, here, made);
    if (combine != nullptr) {
      combine(a, made, sample, first + done, here, m + done * size);
      continue;
    }
    for (int k = 0; k < here; ++k) {
      combine_group(a, runs<T>(), made + k * columns, sample, (first + done + k) * size, size, m + (done + k) * size);
    }
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

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
