// The parameters of the kernel that makes weights, the memory that it needs, and what the step behind it gets.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/make_launch.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {

constexpr int kMomentThreads = 256, kMomentWarps = kMomentThreads / 32;
constexpr int kMaxWords = 1 + kMaxTerms + kInstructionWords * kMaxValues;

struct MomentsLaunch {
  StepArguments a;  // its predictions are null: they are the next member
  Input terms[kMaxTerms];
  bool aligned;     // every sample of every term begins at a multiple of 16 bytes
  uint32_t blocks;  // of a sample
  bool joined;      // whether the launch makes the step too, which is the next member: see joined.h
  Launch step;
};
static_assert(sizeof(MomentsLaunch) <= 4096, "a kernel's parameters have no more bytes");

// The kernel's memory: sums of each part of each sample, in double; a counter of each sample's blocks, 0 between two
// launches; and the step's weights, where they are in another order than `made`.
FASTGUIDE_INLINE int64_t scratch_words(const StepArguments& a) {
  return a.batch * (parts_of(a) * moments_of(terms_of(a)) + 1 + made_columns(a));
}

FASTGUIDE_INLINE double* sums_of(const StepArguments& a) { return a.scratch; }

FASTGUIDE_INLINE int64_t* counters_of(const StepArguments& a) {
  return reinterpret_cast<int64_t*>(a.scratch + a.batch * parts_of(a) * moments_of(terms_of(a)));
}

FASTGUIDE_INLINE float* step_weights_of(const StepArguments& a) {
  return reinterpret_cast<float*>(counters_of(a) + a.batch);
}

FASTGUIDE_INLINE MomentsLaunch make_moments_launch(const StepArguments& a) {
  MomentsLaunch launch{};
  launch.a = a;
  launch.a.predictions = nullptr;
  launch.blocks = uint32_t(parts_of(a));
  launch.aligned = true;
  for (int k = 0; k < terms_of(a); ++k) {
    const Input& term = k < a.num_predictions ? a.predictions[k] : a.sample;
    launch.terms[k] = term;
    launch.aligned = launch.aligned && begins_aligned(term.data, a.batch, term.batch_stride, term.element);
  }
  return launch;
}

// The step that reads the weights. `predictions`: room for one more, which is the sample where it has a weight.
FASTGUIDE_INLINE StepArguments with_made_weights(const StepArguments& a, Input* predictions) {
  StepArguments step = a;
  step.program = nullptr;
  step.weights = a.weighs_sample ? static_cast<const void*>(step_weights_of(a)) : a.made;
  step.weights_step_stride = 0;
  step.weights_batch_stride = made_columns(a);
  step.weighs_sample = false;
  for (int k = 0; k < a.num_predictions; ++k) predictions[k] = a.predictions[k];
  if (a.weighs_sample) predictions[step.num_predictions++] = a.sample;
  step.predictions = predictions;
  return step;
}

}  // namespace fastguide
