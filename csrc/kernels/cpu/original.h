// x0 before it is clipped, of which a threshold is made: the step's own operations, and so its bits.
//
// Part of step.cpp, and compiled with it for each instruction set.
#pragma once

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/loops.h"
#include "kernels/cursor.h"
#include "maths/step.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

template <typename T, int predictions, bool has_gradient>
void original_run(const Row<T>& row, const PairWeights<T>& pair, const Run<T>& run, int64_t count, T* x0) {
  const Row<T> c = row;  // copies, which the output cannot alias
  const PairWeights<T> w = pair;
  const Run<T> r = run;
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    T m = T(0);
    if constexpr (predictions == 1) m = w.sum * r.p0[i];
    if constexpr (predictions == 2) m = guided_prediction(w, r.p0[i], r.p1[i]);
    const T g = has_gradient ? r.g[i] : T(0);
    x0[i] = unclipped_original<T, (predictions > 0), has_gradient>(c, r.x[i], m, g);
  }
}

template <typename T, bool has_gradient>
void original_run(int predictions, const Row<T>& row, const PairWeights<T>& pair, const Run<T>& run, int64_t count,
                  T* x0) {
  if (predictions == 0) return original_run<T, 0, has_gradient>(row, pair, run, count, x0);
  if (predictions == 2) return original_run<T, 2, has_gradient>(row, pair, run, count, x0);
  original_run<T, 1, has_gradient>(row, pair, run, count, x0);  // three and more are combined into one
}

// What x0 of a sample is made with.
template <typename T>
struct OriginalWeights {
  const T* weights;
  Row<T> row;
  PairWeights<T> pair;
};

template <typename T>
OriginalWeights<T> original_weights(const StepArguments& a, int64_t sample) {
  const int64_t index = position_of(a, sample).index;
  const T* weights = weights_of<T>(a, sample, index);
  OriginalWeights<T> made{weights, weighed_row(a, weights, index), pair_weights(weights, a.num_predictions)};
  if (a.num_predictions > 2) made.pair.sum = T(1);
  return made;
}

template <typename T>
void original_of_block(const StepArguments& a, const OriginalWeights<T>& w, const Block& block, Scratch<T>& scratch,
                       T* x0) {
  const Run<T> run = load_guided(a, w.weights, block, scratch);
  if (run.g != nullptr) return original_run<T, true>(a.num_predictions, w.row, w.pair, run, block.count, x0);
  original_run<T, false>(a.num_predictions, w.row, w.pair, run, block.count, x0);
}

// Writes `count` elements of a sample, from `begin` on.
template <typename T>
void original_of_sample(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, T* x0) {
  const OriginalWeights<T> w = original_weights<T>(a, sample);
  Scratch<T> scratch;
  for (int64_t done = 0; done < count; done += kBlock) {
    const Block block{sample, begin + done, count - done < kBlock ? count - done : kBlock};
    original_of_block(a, w, block, scratch, x0 + done);
  }
}

}  // namespace
}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
