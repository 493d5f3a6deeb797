// Operations on runs of elements, at most kBlock of them, of which a backward pass consists: see backward.h.
//
// Part of step.cpp, and compiled with it for each instruction set. What puts them together is compiled once.
#pragma once

#include <cstring>

#include "kernels/cpu/launch.h"
#include "kernels/cpu/loops.h"
#include "maths/step.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

template <typename T>
using Lanes __attribute__((vector_size(64))) = T;

// Adds a*(b - c), or (a - b)^2, to lanes of 64 bytes.
template <typename T, bool squares>
FASTGUIDE_INLINE void add_lanes(const T* a, const T* b, const T* c, size_t bytes, Lanes<T>* sum) {
  Lanes<T> x{}, y{}, z{};
  std::memcpy(&x, a, bytes);
  std::memcpy(&y, b, bytes);
  if constexpr (squares) {
    x -= y;
    *sum += x * x;
  } else {
    std::memcpy(&z, c, bytes);
    *sum += x * (y - z);
  }
}

// Adds them up: in four times as many lanes, and those in double. The order depends on no instruction set.
template <typename T, bool squares>
FASTGUIDE_INLINE double sum_of(const T* a, const T* b, const T* c, int64_t count) {
  constexpr int64_t size = 64 / int64_t(sizeof(T));
  Lanes<T> s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * size <= count; i += 4 * size) {
    add_lanes<T, squares>(a + i, b + i, c + i, sizeof s0, &s0);
    add_lanes<T, squares>(a + i + size, b + i + size, c + i + size, sizeof s0, &s1);
    add_lanes<T, squares>(a + i + 2 * size, b + i + 2 * size, c + i + 2 * size, sizeof s0, &s2);
    add_lanes<T, squares>(a + i + 3 * size, b + i + 3 * size, c + i + 3 * size, sizeof s0, &s3);
  }
  for (; i < count; i += size) {
    const int64_t left = count - i < size ? count - i : size;
    add_lanes<T, squares>(a + i, b + i, c + i, size_t(left) * sizeof(T), &s0);
  }
  const Lanes<T> sum = (s0 + s1) + (s2 + s3);
  double total = 0;
  for (int k = 0; k < size; ++k) total += double(sum[k]);
  return total;
}

template <typename T>
double sum_of_products(const T* a, const T* b, const T* c, int64_t count) {
  return sum_of<T, false>(a, b, c, count);
}

template <typename T>
double sum_of_squares(const T* a, const T* b, int64_t count) {
  return sum_of<T, true>(a, b, b, count);
}

template <typename T>
void sum_of_two(T a, const T* x, T b, const T* y, int64_t count, T* to) {
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) to[i] = fused(a, x[i], b * y[i]);
}

template <typename T>
void product(const T* x, const T* y, int64_t count, T* to) {
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] * y[i];
}

template <typename T>
void keep_unclipped(const Row<T>& row, const T* x, const T* m, const T* g, int64_t count, T* q) {
  const Row<T> c = row;
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const T x0 = unclipped_original<T, true, true>(c, x[i], m[i], g[i]);
    q[i] = x0 > c.clip || x0 < -c.clip ? T(0) : q[i];
  }
}

template <typename T>
void deviations(T base, T span, const T* v, int64_t count, T* to) {
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) to[i] = exponential(T(0.5) * fused(span, v[i], base));
}

// The mean is x' as a step without noise makes it, which adds the noise last: both have the bits of steps.
template <typename T, int predictions>
void noisy_step_of(const Row<T>& row, const PairWeights<T>& pair, const T* x, const T* p0, const T* p1, const T* z,
                   int64_t count, T* mean, T* next) {
  const Row<T> c = row;
  const PairWeights<T> w = pair;
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const T m = predictions == 2 ? guided_prediction(w, p0[i], p1[i]) : w.sum * p0[i];
    const T x0 = clipped(unclipped_original<T, true, false>(c, x[i], m, T(0)), c.clip);
    mean[i] = next_sample<T, true, false, false, false>(c, x0, x[i], m, T(0), T(0), T(0));
    next[i] = fused(c.out_noise, z[i], mean[i]);
  }
}

template <typename T>
void noisy_step(const Row<T>& row, const PairWeights<T>& pair, const T* x, const T* p0, const T* p1, const T* z,
                int64_t count, T* mean, T* next) {
  if (p1 == nullptr) return noisy_step_of<T, 1>(row, pair, x, p0, p0, z, count, mean, next);
  noisy_step_of<T, 2>(row, pair, x, p0, p1, z, count, mean, next);
}

template <typename T>
void guided(const StepArguments& a, const T* weights, int64_t sample, int64_t offset, int64_t count, T* m) {
  Scratch<T> scratch;
  const Block block{sample, offset, count};
  combine_predictions(a, weights, block, scratch);
  std::memcpy(m, scratch.m, size_t(count) * sizeof(T));
}

template <typename T>
const T* load_run(const Input& input, int64_t sample, int64_t offset, int64_t count, T* scratch) {
  return load_block(input, Block{sample, offset, count}, scratch);
}

template <typename T>
void store_run(const T* from, const Output& output, int64_t sample, int64_t offset, int64_t count) {
  store_block(from, output, Block{sample, offset, count});
}

template <typename T>
constexpr RunFunctions<T> kRunFunctions = {load_run<T>,       store_run<T>,      guided<T>,     sum_of_two<T>,
                                           product<T>,        keep_unclipped<T>, deviations<T>, sum_of_products<T>,
                                           sum_of_squares<T>, noisy_step<T>};

}  // namespace

const RunFunctions<float>& float_runs() { return kRunFunctions<float>; }
#if defined(FASTGUIDE_WITHOUT_DOUBLE)  // see kHasDouble
const RunFunctions<double>& double_runs() { return baseline::double_runs(); }
#else
const RunFunctions<double>& double_runs() { return kRunFunctions<double>; }
#endif

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
