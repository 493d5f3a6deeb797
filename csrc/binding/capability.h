// Chooses the CPU kernel's instruction set: the best that the processor has, unless a lower one is asked for.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>

#include "kernels/cpu/launch.h"
#include "kernels/cpu/torch_stream.h"

namespace fastguide {

enum class Capability : int { baseline, avx2, avx512 };

#if defined(__x86_64__)
inline bool has_half_conversions() {  // older compilers' __builtin_cpu_supports does not know "f16c"
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

inline Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs while the library is being loaded
  if (!__builtin_cpu_supports("fma") || !has_half_conversions()) return Capability::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Capability::avx512;
  }
  if (__builtin_cpu_supports("avx2")) return Capability::avx2;
#endif
  return Capability::baseline;
}

inline std::atomic<Capability> selected_capability{best_capability()};

// Selects an instruction set, at most the processor's best; a negative level changes nothing. Returns the one in use.
inline Capability select_capability(int level) {
  if (level >= 0) {
    const int best = static_cast<int>(best_capability());
    selected_capability.store(static_cast<Capability>(std::min(level, best)), std::memory_order_relaxed);
  }
  return selected_capability.load(std::memory_order_relaxed);
}

#define FASTGUIDE_FUNCTIONS(isa) \
  {isa::step_range,       isa::part_moments,   isa::guide_groups, isa::group_part_moments, isa::are_exact_enough, \
   isa::guide_group_part, isa::write_original, isa::tally_float,  isa::tally_double,       isa::append_keys, \
   isa::append_wide_keys, isa::float_runs,     isa::double_runs}

// Returns the functions for an arithmetic in double, or in float.
inline StepFunctions selected_functions(bool double_precision) {
  const Capability selected = selected_capability.load(std::memory_order_relaxed);
  switch (double_precision ? Capability::baseline : selected) {  // kHasDouble
    case Capability::baseline:
      return FASTGUIDE_FUNCTIONS(baseline);
#if defined(__x86_64__)
    case Capability::avx2:
      return FASTGUIDE_FUNCTIONS(avx2);
    case Capability::avx512:
      return FASTGUIDE_FUNCTIONS(avx512);
#else
    case Capability::avx2:
    case Capability::avx512:  // never the best elsewhere
      return FASTGUIDE_FUNCTIONS(baseline);
#endif
  }
  FASTGUIDE_UNREACHABLE();
}
#undef FASTGUIDE_FUNCTIONS

// Gets the functions that draw as torch does; false: there are none for the instruction set.
inline bool selected_stream(StreamFunctions* functions) {
#if defined(__x86_64__)
  const Capability selected = selected_capability.load(std::memory_order_relaxed);
  if (selected == Capability::baseline) return false;
  *functions = selected == Capability::avx2 ? StreamFunctions{avx2::uniforms, avx2::normals}
                                            : StreamFunctions{avx512::uniforms, avx512::normals};
  return true;
#else
  (void)functions;
  return false;
#endif
}

}  // namespace fastguide
