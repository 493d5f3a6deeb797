// A block of a sample: its tensors as T, converted where they are stored as anything else, and three and more
// predictions combined into one. Part of step.cpp, and compiled with it for each instruction set.
#pragma once

#include <cstring>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/launch.h"
#include "kernels/cpu/loops.h"
#include "kernels/cursor.h"
#include "maths/step.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

// The elements of one block, as T; absent tensors are null.
template <typename T>
struct Run {
  const T *x, *p0, *p1, *g, *v, *z;
  T *out, *original;
};

// ---- Three and more predictions ----

template <typename T>
FASTGUIDE_INLINE T value_of(T stored) {
  return stored;
}

template <typename T>
FASTGUIDE_INLINE T value_of(uint16_t bfloat16) {
  return T(from_bfloat16(bfloat16));
}

// Adds sum_k weights[k] (others[k] - p_0) to m, in one pass over `more` others. The first pass begins with weight p_0.
template <typename T, typename Stored, int more, bool begins>
void add_guidance(T weight, const T* weights, const Stored* first, const Stored* const* others, int64_t count, T* m) {
  T w[more];
  const Stored* p[more];
  for (int k = 0; k < more; ++k) {
    w[k] = weights[k];
    p[k] = others[k];
  }
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const T p0 = value_of<T>(first[i]);
    T sum = begins ? weight * p0 : m[i];
    for (int k = 0; k < more; ++k) sum = fused(w[k], value_of<T>(p[k][i]) - p0, sum);
    m[i] = sum;
  }
}

// The predictions beside the first that one pass takes; for double, more are not worth their code.
template <typename T>
constexpr int kOthers = sizeof(T) == sizeof(float) ? 3 : 1;

template <typename T, typename Stored, bool begins>
void add_guidance(int more, T weight, const T* weights, const Stored* first, const Stored* const* others, int64_t count,
                  T* m) {
  if (more == 1) add_guidance<T, Stored, 1, begins>(weight, weights, first, others, count, m);
  if constexpr (kOthers<T> == 3) {
    if (more == 2) add_guidance<T, Stored, 2, begins>(weight, weights, first, others, count, m);
    if (more == 3) add_guidance<T, Stored, 3, begins>(weight, weights, first, others, count, m);
  }
}

// Computes m. find(k, n) returns prediction k, and may convert it into the n-th place.
template <typename T, typename Stored, typename Find>
void combine(int num_predictions, const T* weights, const Find& find, int64_t count, T* m) {
  const Stored* first = find(0, 0);
  for (int k = 1; k < num_predictions; k += kOthers<T>) {
    const int left = num_predictions - k, more = left < kOthers<T> ? left : kOthers<T>;
    const Stored* others[kOthers<T>] = {};
    for (int n = 0; n < more; ++n) others[n] = find(k + n, n + 1);
    if (k == 1) {
      add_guidance<T, Stored, true>(more, weights[0], weights + k, first, others, count, m);
    } else {
      add_guidance<T, Stored, false>(more, weights[0], weights + k, first, others, count, m);
    }
  }
}

// ---- Blocks ----

// `count` elements of a sample, from `offset` on.
struct Block {
  int64_t sample, offset, count;
};

// What a block's tensors are converted into, and computed in, where they are not used in place.
template <typename T>
struct Scratch {
  alignas(64) T x[kBlock], m[kBlock], predictions[kOthers<T> + 1][kBlock];
  T g[kBlock], v[kBlock], z[kBlock], out[kBlock], original[kBlock];
  T mask[kBlock], known[kBlock], known_z[kBlock], staged[kBlock];
};

// This is a call because conversions of four dtypes would be inlined a dozen times.
template <typename T>
__attribute__((noinline)) const T* load_block(const Input& input, const Block& block, T* scratch) {
  return load(input, block.sample * input.batch_stride + block.offset, block.count, scratch);
}

template <typename T>
__attribute__((noinline)) void store_block(const T* from, const Output& output, const Block& block) {
  store(from, output, block.sample * output.batch_stride + block.offset, block.count);
}

template <typename T>
void copy_to(T* to, const T* from, int64_t count) {
  if (to != from) std::memcpy(to, from, size_t(count) * sizeof(T));
}

// Returns the output's own memory if it stores T, otherwise scratch.
template <typename T>
T* place_of(const Output& output, const Block& block, T* scratch) {
  if (!stored_as<T>(output.element)) return scratch;
  return static_cast<T*>(output.data) + block.sample * output.batch_stride + block.offset;
}

bool all_bfloat16(const StepArguments& a) {
  for (int k = 0; k < a.num_predictions; ++k) {
    if (a.predictions[k].element != Element::bfloat16) return false;
  }
  return true;
}

template <typename T>
void combine_predictions(const StepArguments& a, const T* weights, const Block& block, Scratch<T>& scratch) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (all_bfloat16(a)) {  // converted while they are combined
      const auto stored = [&](int k, int) {
        const Input& input = a.predictions[k];
        return static_cast<const uint16_t*>(input.data) + block.sample * input.batch_stride + block.offset;
      };
      return combine<T, uint16_t>(a.num_predictions, weights, stored, block.count, scratch.m);
    }
  }
  const auto converted = [&](int k, int place) {
    return load_block(a.predictions[k], block, scratch.predictions[place]);
  };
  combine<T, T>(a.num_predictions, weights, converted, block.count, scratch.m);
}

// The block's sample, its guided prediction or what that is combined of, and its gradient.
template <typename T>
Run<T> load_guided(const StepArguments& a, const T* weights, const Block& block, Scratch<T>& scratch) {
  Run<T> run{};
  run.x = load_block(a.sample, block, scratch.x);
  if (a.num_predictions > 2) {
    combine_predictions(a, weights, block, scratch);
    run.p0 = scratch.m;
  } else {
    if (a.num_predictions > 0) run.p0 = load_block(a.predictions[0], block, scratch.predictions[0]);
    if (a.num_predictions > 1) run.p1 = load_block(a.predictions[1], block, scratch.predictions[1]);
  }
  if (a.gradient.data != nullptr) run.g = load_block(a.gradient, block, scratch.g);
  return run;
}

// ---- Rows ----

template <typename T>
const T* weights_of(const StepArguments& a, int64_t sample, int64_t index) {
  return static_cast<const T*>(a.weights) + index * a.weights_step_stride + sample * a.weights_batch_stride;
}

// The row of a sample with what its weights say folded into it.
template <typename T>
Row<T> weighed_row(const StepArguments& a, const T* weights, int64_t index) {
  const Row<T> row = with_gradient_scale(row_at<T>(a, index), gradient_scale(weights, a.num_predictions));
  return a.weighs_sample ? with_sample_weight(row, weights[a.num_predictions + 1]) : row;
}

}  // namespace
}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
