// Operations on runs of elements, at most kBlock of them, of which a backward pass consists: see backward.h.
//
// Part of step.cpp, and compiled with it for each instruction set. What puts them together is compiled once.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels/cpu/launch.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/registers.h"
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

// ---- Bits of a clip: a word for 64 bytes of elements, the first one's the lowest ----

template <typename T>
using Words = decltype(Register<T>{} == Register<T>{});
template <typename T>
constexpr int kLanes = kRegisterBytes / int(sizeof(T));

// The bits of the elements of one register.
template <typename T>
FASTGUIDE_INLINE Words<T> bits_of_lanes(int part) {
  Words<T> own;
  for (int k = 0; k < kLanes<T>; ++k) own[k] = 1 << (part * kLanes<T> + k);
  return own;
}

template <typename T>
FASTGUIDE_INLINE uint16_t clipped_word(const T* x0, T clip) {
  Words<T> found{};
  for (int part = 0; part < 64 / kRegisterBytes; ++part) {
    Register<T> values;
    std::memcpy(&values, x0 + part * kLanes<T>, sizeof values);
    found |= ((values > clip) | (values < -clip)) & bits_of_lanes<T>(part);
  }
  int word = 0;
  for (int k = 0; k < kLanes<T>; ++k) word |= int(found[k]);
  return uint16_t(word);
}

#if defined(__AVX512F__)
FASTGUIDE_INLINE uint16_t clipped_word(const float* x0, float clip) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(x0)), _mm512_set1_ps(clip), _CMP_GT_OQ);
}
#elif defined(__AVX2__)
FASTGUIDE_INLINE uint16_t clipped_word(const float* x0, float clip) {
  const auto byte_of = [&](const float* values) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(values));
    return _mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(clip), _CMP_GT_OQ));
  };
  return uint16_t(byte_of(x0) | byte_of(x0 + 8) << 8);
}
#endif

template <typename T>
void write_clipped(const T* x0, T clip, int64_t count, uint8_t* bits) {
  constexpr int64_t size = 64 / int64_t(sizeof(T));
  T last[size] = {};
  for (int64_t i = 0; i < count; i += size) {
    const int64_t left = count - i < size ? count - i : size;
    if (left < size) std::memcpy(last, x0 + i, size_t(left) * sizeof(T));
    const uint16_t word = clipped_word(left < size ? last : x0 + i, clip);
    for (int64_t k = 0; k < left; k += 8) bits[(i + k) / 8] = uint8_t(word >> k);
  }
}

template <typename T>
void keep_unclipped_bits(const uint8_t* bits, int64_t count, T* q) {
  constexpr int64_t size = 64 / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + size <= count; i += size) {
    int word = bits[i / 8];
    if (size > 8) word |= bits[i / 8 + 1] << 8;
    for (int part = 0; part < 64 / kRegisterBytes; ++part) {
      T* to = q + i + part * kLanes<T>;
      Words<T> values;
      std::memcpy(&values, to, sizeof values);
      values &= (bits_of_lanes<T>(part) & word) == 0;
      std::memcpy(to, &values, sizeof values);
    }
  }
  for (; i < count; ++i) q[i] = bits[i / 8] >> i % 8 & 1 ? T(0) : q[i];
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
constexpr RunFunctions<T> kRunFunctions = {load_run<T>,   store_run<T>,       guided<T>,         sum_of_two<T>,
                                           product<T>,    keep_unclipped<T>,  write_clipped<T>,  keep_unclipped_bits<T>,
                                           deviations<T>, sum_of_products<T>, sum_of_squares<T>, noisy_step<T>};

}  // namespace

const RunFunctions<float>& float_runs() { return kRunFunctions<float>; }
#if defined(FASTGUIDE_WITHOUT_DOUBLE)  // see kHasDouble
const RunFunctions<double>& double_runs() { return baseline::double_runs(); }
#else
const RunFunctions<double>& double_runs() { return kRunFunctions<double>; }
#endif

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
