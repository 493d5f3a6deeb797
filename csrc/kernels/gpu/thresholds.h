// The parameters of the kernel that finds thresholds, and the words of the memory that it works in.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/make_launch.h"
#include "kernels/gpu/parameters.h"
#include "kernels/thresholds.h"

namespace fastguide {

constexpr int kThresholdThreads = 512;

// A sample's words: 1 over its threshold; blocks that have counted; the bits that are known, and the rank among what
// begins with them; two words as of `Beyond` in thresholds.cu; and the counts. All but the first are 0 between two
// steps.
constexpr int kThresholdBlocks = 1, kThresholdKnown = 2, kThresholdRank = 3, kThresholdNotNext = 4,
              kThresholdLargest = 5, kThresholdFirstBin = 8;
static_assert(kThresholdFirstBin + kThresholdBins == kThresholdWords, "the counts are the last words");

struct ThresholdsLaunch {
  Launch step;  // without its thresholds
  void* thresholds;
  int pass;  // 0, 1, 2
};

// a: a step whose weights are made.
FASTGUIDE_INLINE ThresholdsLaunch make_thresholds_launch(const StepArguments& a) {
  StepArguments read = a;  // what x0 is made of
  read.inverse_thresholds = nullptr;
  read.original = read.staged = read.history = Output{};
  read.variance = read.noise = read.mask = read.known = read.known_noise = read.anchor = Input{};
  read.noise_kind = Noise::none;
  ThresholdsLaunch launch{};
  launch.step = make_launch(read);
  launch.thresholds = a.inverse_thresholds;
  return launch;
}

}  // namespace fastguide
