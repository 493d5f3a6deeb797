// Weights from moments and the step behind them in one launch: which steps may have it, and its parameters.
//
// A block has one part of a sample, as where the weights are made by a launch of their own; it adds the part up, waits
// for the other blocks of its sample, makes the weights, and steps the part. Blocks can wait for each other if there is
// one of a sample, or if they are a cluster. What is computed is the same in the same order, so that the bits are those
// of two launches.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/make_launch.h"
#include "kernels/gpu/moments.h"
#include "kernels/gpu/parameters.h"
#include "kernels/weights.h"

namespace fastguide {

// The most blocks of a cluster on any GPU that has clusters.
constexpr int kMostBlocks = 8;

// The most parts of a sample. If a block had several, they would follow one another where two launches have them side
// by side, and each would take about half of what a launch takes: docs/performance.md estimates it.
#if !defined(FASTGUIDE_MOST_PARTS)  // the tests choose it
#define FASTGUIDE_MOST_PARTS kMostBlocks
#endif

// A power of two, as clusters are known to be launched: the last ones may have no part.
FASTGUIDE_INLINE uint32_t blocks_of_sample(const StepArguments& a) {
  uint32_t blocks = 1;
  while (blocks < parts_of(a)) blocks *= 2;
  return blocks;
}

// Whether one launch makes the weights and the step, if blocks_of_sample can wait for each other. step: the launch
// behind that of the weights. Thresholds have launches of their own in between.
//
// Torch's noise needs a Philox call an element, which takes longer in few blocks. A gradient, a learned variance and a
// mask are rare, and so are samples that are not made of whole vectors.
FASTGUIDE_INLINE bool can_join(const StepArguments& a, const Launch& step) {
  const bool others = a.gradient.data != nullptr || a.variance.data != nullptr || a.mask.data != nullptr;
  const bool draws = a.noise_kind == Noise::torch_stream || (a.noise_kind == Noise::portable && a.channels != 1);
  return a.inverse_thresholds == nullptr && !others && !draws && step.aligned && a.elements_per_sample % kVector == 0 &&
         parts_of(a) <= FASTGUIDE_MOST_PARTS && a.batch <= kMaxTiles / kMostBlocks;
}

// step: as of can_join.
FASTGUIDE_INLINE MomentsLaunch make_joined_launch(const StepArguments& a, const Launch& step) {
  MomentsLaunch launch = make_moments_launch(a);
  launch.blocks = blocks_of_sample(a);
  launch.joined = true;
  launch.step = step;
  return launch;
}

}  // namespace fastguide
