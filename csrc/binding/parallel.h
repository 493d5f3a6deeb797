// Shares work out among torch's threads on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace fastguide {

// Calls f(begin, end) for ranges of 0 to total, in parallel if that is worth it.
template <typename F>
void in_parallel(int64_t total, int64_t grain, const F& f) {
  if (total <= grain) {
    f(int64_t{0}, total);
  } else {
    torch::stable::parallel_for(0, total, grain, f);
  }
}

}  // namespace fastguide
