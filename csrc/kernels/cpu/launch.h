// The CPU kernel's entry points, one set for each instruction set. No torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/thresholds.h"
#include "maths/step.h"

namespace fastguide {

// Elements converted at a time: eight runs of them, 4 bytes each, fit the first-level cache.
constexpr int64_t kBlock = 512;

// Whether this instruction set is compiled for double too. On x86 the baseline makes such steps, which are for checks
// of a loop rather than for speed: the library is smaller by a twentieth.
#if defined(FASTGUIDE_WITHOUT_DOUBLE)
constexpr bool kHasDouble = false;
#else
constexpr bool kHasDouble = true;
#endif

// What may be written behind keys that are appended to others.
constexpr int64_t kMoreKeys = 16;

// Operations on `count` elements, at most kBlock, of which backward passes consist: see cpu/backward.h. `to` may be one
// of the operands.
template <typename T>
struct RunFunctions {
  // A sample's elements from `offset` on, as T: in place, or in scratch.
  const T* (*load)(const Input& input, int64_t sample, int64_t offset, int64_t count, T* scratch);
  void (*store)(const T* from, const Output& output, int64_t sample, int64_t offset, int64_t count);
  // m of two and more predictions.
  void (*guided)(const StepArguments& arguments, const T* weights, int64_t sample, int64_t offset, int64_t count, T* m);
  void (*sum_of_two)(T a, const T* x, T b, const T* y, int64_t count, T* to);  // a*x + b*y
  void (*product)(const T* x, const T* y, int64_t count, T* to);
  // Makes q zero where the step has clipped x0.
  void (*keep_unclipped)(const Row<T>& row, const T* x, const T* m, const T* g, int64_t count, T* q);
  // Writes which of them a clip changes, a bit each; and makes q zero where such bits are set.
  void (*write_clipped)(const T* x0, T clip, int64_t count, uint8_t* bits);
  void (*keep_unclipped_bits)(const uint8_t* bits, int64_t count, T* q);
  void (*deviations)(T base, T span, const T* v, int64_t count, T* to);          // exp((base + span*v)/2)
  double (*sum_of_products)(const T* a, const T* b, const T* c, int64_t count);  // of a*(b - c)
  double (*sum_of_squares)(const T* a, const T* b, int64_t count);               // of (a - b)^2
  // Writes the mean of a step, and x': the mean and then the noise. p1: null with one prediction.
  void (*noisy_step)(const Row<T>& row, const PairWeights<T>& pair, const T* x, const T* p0, const T* p1, const T* z,
                     int64_t count, T* mean, T* next);
};

// What a step on the CPU consists of.
struct StepFunctions {
  // Computes the elements begin <= i < end of all samples, counted one sample after the other.
  void (*step_range)(const StepArguments& arguments, int64_t begin, int64_t end);
  // Writes the moments of `count` parts of a sample from `first` on, one after the other, see kernels/weights.h: but
  // sums of terms only if the sample's program reads them.
  void (*part_moments)(const StepArguments& arguments, int64_t sample, int64_t first, int64_t count, double* moments);
  // Writes the weights of `count` of a sample's groups from `first` on, of one part each, and their guided prediction,
  // in the arithmetic's type: see StepArguments::groups.
  void (*guide_groups)(const StepArguments& arguments, int64_t sample, int64_t first, int64_t count, void* weights,
                       void* m);
  // The same of a group of several parts, one after the other. Writes the first `wanted` moments of `count` elements
  // from the sample's element `begin` on; `exactly`: in double, as they are to be once are_exact_enough denies the
  // group's moments.
  void (*group_part_moments)(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, int wanted,
                             bool exactly, double* moments);
  bool (*are_exact_enough)(const StepArguments& arguments, int wanted, const double* moments);
  // Writes their guided prediction by the group's weights.
  void (*guide_group_part)(const StepArguments& arguments, const double* weights, const double* moments, int64_t sample,
                           int64_t begin, int64_t count, void* m);
  // Writes x0 before it is clipped, of `count` elements of a sample from `begin` on, in the arithmetic's type.
  void (*write_original)(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, void* x0);
  // Count the magnitudes of such x0, and append the keys of those between 1 and the top to `between`, which has room
  // for kMoreKeys more.
  void (*tally_float)(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count,
                      Tally<float>* so_far, int32_t* between);
  void (*tally_double)(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count,
                       Tally<double>* so_far, int64_t* between);
  // Append the keys among `count` that are above `low` and at most `high`; return how many they are.
  int64_t (*append_keys)(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to);
  int64_t (*append_wide_keys)(const int64_t* keys, int64_t count, int64_t low, int64_t high, int64_t* to);
  const RunFunctions<float>& (*float_runs)();
  const RunFunctions<double>& (*double_runs)();
};

// portable_noise writes `count` values, at most kBlock: those of a sample's elements from `begin` on. group_moments
// writes the first `wanted` moments of each of some groups, one's kMostMoments after another's.
#define FASTGUIDE_DECLARE(isa) \
  namespace isa { \
  void step_range(const StepArguments& arguments, int64_t begin, int64_t end); \
  void part_moments(const StepArguments& arguments, int64_t sample, int64_t first, int64_t count, double* moments); \
  void guide_groups(const StepArguments& arguments, int64_t sample, int64_t first, int64_t count, void* weights, \
                    void* m); \
  void group_part_moments(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, int wanted, \
                          bool exactly, double* moments); \
  bool are_exact_enough(const StepArguments& arguments, int wanted, const double* moments); \
  void guide_group_part(const StepArguments& arguments, const double* weights, const double* moments, int64_t sample, \
                        int64_t begin, int64_t count, void* m); \
  void write_original(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, void* x0); \
  void tally_float(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, Tally<float>* so_far, \
                   int32_t* between); \
  void tally_double(const StepArguments& arguments, int64_t sample, int64_t begin, int64_t count, \
                    Tally<double>* so_far, int64_t* between); \
  int64_t append_keys(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to); \
  int64_t append_wide_keys(const int64_t* keys, int64_t count, int64_t low, int64_t high, int64_t* to); \
  const RunFunctions<float>& float_runs(); \
  const RunFunctions<double>& double_runs(); \
  void group_moments(const StepArguments& arguments, int64_t sample, int64_t first, int64_t groups, int wanted, \
                     double* moments); \
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
