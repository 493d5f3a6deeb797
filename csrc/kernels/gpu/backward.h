// The parameters of the CUDA kernel of a step's backward pass. Host and device, no torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/backward.h"
#include "kernels/gpu/make_launch.h"
#include "kernels/gpu/parameters.h"
#include "kernels/gpu/vector.h"

namespace fastguide {

constexpr int kBackwardThreads = 128, kBackwardWarps = kBackwardThreads / 32;
constexpr int kBackwardTile = kBackwardThreads * kVector;  // elements of a block
constexpr int kMaxColumns = kMaxPredictions + 1;           // of weights

// What a tensor that is written is the gradient of.
enum class Of : int { sample, prediction, gradient, variance, noise, anchor, history };

struct GradientOutput {
  Output to;
  Of of;
  int number;  // of a prediction, or of a slot of the history
};

constexpr int kMaxGradients = kMaxPredictions + kMaxSlots + 5;

struct BackwardLaunch {
  StepArguments a;  // its predictions are null: they are the next member
  Input predictions[kMaxPredictions];
  Input grad_out, grad_original, grad_left;
  int slots, outputs;
  GradientOutput output[kMaxGradients];
  double* sums;   // (batch, tiles, columns): what each tile adds to the gradients of weights; null: absent
  int64_t tiles;  // the launch is refused if they are more than kMaxTiles
  Divisor tiles_per_sample;
  bool aligned;  // every sample of every tensor begins at a multiple of 16 bytes
};
static_assert(sizeof(BackwardLaunch) <= 4096, "a kernel's parameters have no more bytes");

FASTGUIDE_INLINE int64_t backward_tiles_of(const StepArguments& a) {
  return (a.elements_per_sample + kBackwardTile - 1) / kBackwardTile;
}

FASTGUIDE_INLINE void add_output(BackwardLaunch& launch, Of of, const Output& output, int number = 0) {
  if (output.data == nullptr) return;
  launch.output[launch.outputs++] = {output, of, number};
  launch.aligned = launch.aligned && begins_aligned(output.data, launch.a.batch, output.batch_stride, output.element);
}

FASTGUIDE_INLINE void add_outputs(BackwardLaunch& launch, const BackwardArguments& b) {
  const StepArguments& a = launch.a;
  add_output(launch, Of::sample, b.grad_sample);
  for (int k = 0; b.grad_predictions != nullptr && k < a.num_predictions; ++k) {
    add_output(launch, Of::prediction, b.grad_predictions[k], k);
  }
  add_output(launch, Of::gradient, b.grad_gradient);
  add_output(launch, Of::variance, b.grad_variance);
  add_output(launch, Of::noise, b.grad_noise);
  add_output(launch, Of::anchor, b.grad_anchor);
  Output slot = b.grad_history;
  for (int k = 0; slot.data != nullptr && k < b.slots; ++k) {
    add_output(launch, Of::history, slot, k);
    slot.data = static_cast<char*>(slot.data) + a.batch * slot.batch_stride * element_bytes(slot.element);
  }
}

FASTGUIDE_INLINE BackwardLaunch make_backward_launch(const StepArguments& a, const BackwardArguments& b) {
  BackwardLaunch launch{};
  launch.a = a;
  launch.a.predictions = nullptr;
  for (int k = 0; k < a.num_predictions; ++k) launch.predictions[k] = a.predictions[k];
  launch.grad_out = b.grad_out;
  launch.grad_original = b.grad_original;
  launch.grad_left = b.grad_left;
  launch.slots = b.slots;
  launch.sums = b.grad_weights;
  launch.aligned = true;
  const auto check = [&](const Input& input, int64_t samples) {
    launch.aligned = launch.aligned && begins_aligned(input.data, samples, input.batch_stride, input.element);
  };
  for_each_input(a, a.predictions, [&](Argument, const Input& input) { check(input, a.batch); });
  check(b.grad_out, a.batch);
  check(b.grad_original, a.batch);
  check(b.grad_left, a.batch * b.slots);
  add_outputs(launch, b);
  launch.tiles_per_sample = divisor_of(uint32_t(backward_tiles_of(a)));
  launch.tiles = a.batch * backward_tiles_of(a);
  return launch;
}

}  // namespace fastguide
