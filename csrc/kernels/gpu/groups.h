// The parameters of the kernel that guides groups of elements and makes their step, or leaves it to a launch of its
// own; the memory that it needs for that, and what the step behind it gets.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/parameters.h"
#include "kernels/gpu/vector.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {

// The most terms of a guidance: predictions, and the sample if it has a weight.
constexpr int kMostOfGroupTerms = 3;
constexpr int kGroupThreads = 128;
// The most elements of a group. A block has the largest groups, and its threads share their elements out.
constexpr int64_t kMostOfGroup = 16384;
// A warp or less has a group of at most so many elements, so that several are in flight.
constexpr int64_t kMostOfWarp = 2048;
constexpr int kLeastLaneBits = 2;  // of a group: fewer lanes would need more values than a block has
// What a block's groups compute their weights with: 32 groups of programs as the ones in fastguide/guidance.
constexpr int kGroupValues = 1408;

// What a thread does with its elements, one after the other: sums if the program reads any, third if there are three
// terms.
enum class Pass : int { pairs, sums, third, guides };

struct GroupsLaunch {
  StepArguments a;  // as if a group were a sample; its predictions are null: they are the next member
  Input predictions[2];
  int terms;       // two or three
  Input third;     // what the third of three terms is made of; of two, the sample of a step
  int third_in;    // a bit for each pass that reads it
  bool steps;      // whether the launch makes the step; otherwise it leaves the guided prediction
  Output written;  // the next sample, or the guided prediction, one sample behind the other
  // Without the step, (batch, 2): its weight of the guided prediction, which is 1, and the gradient's scale.
  float* weights;
  // Whether an element is at a multiple of 16 bytes in every tensor where its place, of samples that are `stride`
  // apart, has none of these bits.
  bool aligned;
  int within_bits;
  int64_t stride;
  int64_t groups_of_sample;
  int lane_bits;   // the binary logarithm of a group's threads
  int groups;      // of a block
  int values;      // of a group, an odd number: neighbours then begin in other banks of the shared memory
  Divisor chunks;  // of a sample: a block has one of them
  int64_t blocks;  // the launch is refused if they are more than kMaxTiles
};

// In words of 8 bytes. Of groups, no number is kept from one step to the next.
FASTGUIDE_INLINE int64_t group_scratch_words(const StepArguments& a) {
  return a.batch + (a.batch * a.elements_per_sample + 1) / 2;
}

FASTGUIDE_INLINE float* weights_of_guided(const StepArguments& a) {
  return reinterpret_cast<float*>(a.scratch + (a.batch * a.elements_per_sample + 1) / 2);
}

FASTGUIDE_INLINE int lane_bits_of(int64_t size) {
  if (size > kMostOfWarp) return 7;  // a block
  int bits = kLeastLaneBits;
  while (bits < 5 && int64_t(kVector) << bits < size) ++bits;
  return bits;
}

// Whether the kernel takes these.
FASTGUIDE_INLINE bool groups_fit(const StepArguments& a) {
  return a.num_predictions >= 2 && terms_of(a) <= kMostOfGroupTerms && a.elements_per_sample / a.groups <= kMostOfGroup;
}

// Whether a launch makes the step where it can.
#if !defined(FASTGUIDE_STEP_GROUPS)  // the tests choose it
#define FASTGUIDE_STEP_GROUPS true
#endif

// Whether one launch makes the step too. Thresholds have launches of their own in between; a gradient, a learned
// variance, a mask and drawn noise are rare here, and so is noise in an x0 that is returned.
FASTGUIDE_INLINE bool groups_step(const StepArguments& a) {
  const bool others = a.gradient.data != nullptr || a.variance.data != nullptr || a.mask.data != nullptr;
  const bool draws = a.noise_kind == Noise::torch_stream || a.noise_kind == Noise::portable;
  const bool noisy_original = a.noise_kind == Noise::given && a.original.data != nullptr;
  return FASTGUIDE_STEP_GROUPS && a.inverse_thresholds == nullptr && !others && !draws && !noisy_original;
}

// Calls f(tensor, copies) for each tensor that a launch reads or writes element by element, but absent ones.
template <typename F>
FASTGUIDE_INLINE void for_each_of_groups(const StepArguments& a, const GroupsLaunch& launch, const F& f) {
  const auto call = [&](const auto& tensor, int copies) {
    if (tensor.data != nullptr) f(tensor, copies);
  };
  for (const Input& prediction : launch.predictions) call(prediction, 1);
  call(launch.third, 1);
  call(launch.written, 1);
  if (!launch.steps) return;
  for_each_input(a, [&](Argument, const Input& input) { call(input, 1); });
  for_each_output(a, [&](Argument, const Output& output, int copies) { call(output, copies); });
}

FASTGUIDE_INLINE void set_alignment(const StepArguments& a, GroupsLaunch& launch) {
  launch.within_bits = 0;
  for_each_of_groups(a, launch,
                     [&](const auto& tensor, int) { launch.within_bits |= 16 / element_bytes(tensor.element) - 1; });
  launch.stride = launch.written.batch_stride;
  launch.aligned = true;
  for_each_of_groups(a, launch, [&](const auto& tensor, int copies) {
    const int64_t between = copies > 1 ? a.batch * tensor.batch_stride : 0;  // one copy and the next
    const int64_t apart = a.batch > 1 ? tensor.batch_stride - launch.stride : 0;
    launch.aligned = launch.aligned && reinterpret_cast<uint64_t>(tensor.data) % 16 == 0 &&
                     ((between | apart) & launch.within_bits) == 0;
  });
}

FASTGUIDE_INLINE GroupsLaunch make_groups_launch(const StepArguments& a) {
  GroupsLaunch launch{};
  launch.a = a;
  launch.a.predictions = nullptr;
  launch.a.elements_per_sample = a.elements_per_sample / a.groups;
  launch.a.groups = 1;
  for (int k = 0; k < 2; ++k) launch.predictions[k] = a.predictions[k];
  launch.steps = groups_step(a);
  launch.terms = terms_of(a);
  launch.third_in = launch.terms > 2 ? ~(1 << int(Pass::pairs)) : launch.steps << int(Pass::guides);
  if (a.num_predictions > 2) launch.third = a.predictions[2];
  if (a.num_predictions == 2 && (launch.steps || a.weighs_sample)) launch.third = a.sample;
  launch.written = launch.steps ? a.out : Output{a.scratch, a.elements_per_sample, Element::float32};
  set_alignment(a, launch);
  launch.weights = weights_of_guided(a);
  launch.groups_of_sample = a.groups;
  launch.lane_bits = lane_bits_of(launch.a.elements_per_sample);
  const int64_t instructions = (a.program_words - 1 - launch.terms) / kInstructionWords;
  const int64_t values = moments_of(launch.terms) + kOtherInputs + a.num_parameters + instructions;
  launch.values = int(values < kMaxValues ? values : kMaxValues) | 1;
  const int of_threads = kGroupThreads >> launch.lane_bits, of_values = kGroupValues / launch.values;
  launch.groups = of_threads < of_values ? of_threads : of_values;
  const int64_t chunks = (a.groups + launch.groups - 1) / launch.groups;
  launch.blocks = a.batch * chunks;
  launch.chunks = divisor_of(uint32_t(chunks));
  return launch;
}

// The step of the guided prediction, and nothing else. `prediction`: room for it.
FASTGUIDE_INLINE StepArguments with_guided_prediction(const StepArguments& a, Input* prediction) {
  StepArguments step = a;
  step.program = nullptr;
  step.weighs_sample = false;
  step.weights = weights_of_guided(a);
  step.weights_step_stride = 0;
  step.weights_batch_stride = 2;
  *prediction = {a.scratch, a.elements_per_sample, Element::float32};
  step.predictions = prediction;
  step.num_predictions = 1;
  return step;
}

}  // namespace fastguide
