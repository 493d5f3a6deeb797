// The CPU kernel's entry points, one set for each instruction set. No torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"

namespace fastguide {

// Elements converted at a time: eight runs of them, 4 bytes each, fit the first-level cache.
constexpr int64_t kBlock = 512;

// What a step on the CPU consists of.
struct StepFunctions {
  // Computes the elements begin <= i < end of all samples, counted one sample after the other.
  void (*step_range)(const StepArguments& arguments, int64_t begin, int64_t end);
  // Writes the moments of one part of a sample, see kernels/weights.h.
  void (*part_moments)(const StepArguments& arguments, int64_t sample, int64_t part, double* moments);
};

// portable_noise writes `count` values, at most kBlock: those of a sample's elements from `begin` on.
#define FASTGUIDE_DECLARE(isa) \
  namespace isa { \
  void step_range(const StepArguments& arguments, int64_t begin, int64_t end); \
  void part_moments(const StepArguments& arguments, int64_t sample, int64_t part, double* moments); \
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
