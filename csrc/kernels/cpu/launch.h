// The CPU kernel's entry points, one set for each instruction set. No torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/thresholds.h"

namespace fastguide {

// Elements converted at a time: eight runs of them, 4 bytes each, fit the first-level cache.
constexpr int64_t kBlock = 512;

// Whether this instruction set is compiled for double too. AVX-512 is not: AVX2 makes such steps, as fast as the memory
// allows, and the library is smaller.
#if defined(__AVX512F__)
constexpr bool kHasDouble = false;
#else
constexpr bool kHasDouble = true;
#endif

// What may be written behind keys that are appended to others.
constexpr int64_t kMoreKeys = 16;

// What a step on the CPU consists of.
struct StepFunctions {
  // Computes the elements begin <= i < end of all samples, counted one sample after the other.
  void (*step_range)(const StepArguments& arguments, int64_t begin, int64_t end);
  // Writes the moments of one part of a sample, see kernels/weights.h.
  void (*part_moments)(const StepArguments& arguments, int64_t sample, int64_t part, double* moments);
  // Writes x0 before it is clipped, of `count` elements of a sample from `begin` on, in the arithmetic's type.
  void (*write_original)(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, void* x0);
  // Count `count` magnitudes of x0, and append the keys of those between 1 and the top to `between`, which has room for
  // kMoreKeys more.
  void (*tally_float)(const float* x0, int64_t count, float top, Tally<float>* so_far, int32_t* between);
  void (*tally_double)(const double* x0, int64_t count, double top, Tally<double>* so_far, int64_t* between);
  // Append the keys among `count` that are above `low` and at most `high`; return how many they are.
  int64_t (*append_keys)(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to);
  int64_t (*append_wide_keys)(const int64_t* keys, int64_t count, int64_t low, int64_t high, int64_t* to);
};

// portable_noise writes `count` values, at most kBlock: those of a sample's elements from `begin` on.
#define FASTGUIDE_DECLARE(isa) \
  namespace isa { \
  void step_range(const StepArguments& arguments, int64_t begin, int64_t end); \
  void part_moments(const StepArguments& arguments, int64_t sample, int64_t part, double* moments); \
  void write_original(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, void* x0); \
  void tally_float(const float* x0, int64_t count, float top, Tally<float>* so_far, int32_t* between); \
  void tally_double(const double* x0, int64_t count, double top, Tally<double>* so_far, int64_t* between); \
  int64_t append_keys(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to); \
  int64_t append_wide_keys(const int64_t* keys, int64_t count, int64_t low, int64_t high, int64_t* to); \
  void portable_noise(const StepArguments& arguments, int64_t sample, uint32_t step, int64_t begin, int64_t count, \
                      float* z); \
  }

FASTGUIDE_DECLARE(baseline)
#if defined(__x86_64__)
FASTGUIDE_DECLARE(avx2)
FASTGUIDE_DECLARE(avx512)
#endif
#undef FASTGUIDE_DECLARE

}  // namespace fastguide
