// A guided step's arguments as plain data, from the binding to the kernels. No torch.
#pragma once

#include <cstdint>

#include "maths/element.h"

namespace fastguide {

// A tensor that is dense within a sample, all in the same order of elements; batch_stride counts elements.
struct Input {
  const void* data = nullptr;  // null: absent
  int64_t batch_stride = 0;
  Element element = Element::float32;
};

struct Output {
  void* data = nullptr;  // null: absent
  int64_t batch_stride = 0;
  Element element = Element::float32;
};

// Where the noise z comes from.
enum class Noise : int {
  none,
  given,         // a tensor
  torch_stream,  // the values of torch.randn on a GPU
  portable,      // Philox keyed by the sample's seed
};

// The stream of torch's CUDA generator, from a state on the host or on the device.
struct TorchStream {
  uint64_t seed = 0, offset = 0;
  // Unless null: seed, offset and how many blocks have read them; the last one moves the offset on.
  int64_t* state = nullptr;
  uint32_t threads = 0;    // of torch's own kernel for a tensor of this size
  uint64_t increment = 0;  // by how much that kernel moves the offset; the launch knows
};

enum class TimestepElement : int { int64, float32 };

struct StepArguments {
  Output out, original;
  Output staged;  // the next model input: staged_copies times the batch, one after the other
  int staged_copies;
  Input sample, gradient, variance;
  const Input* predictions;
  int num_predictions;
  int64_t batch, elements_per_sample;
  bool double_precision;  // rows and weights, and the arithmetic, are double; otherwise float
  const void* rows;       // (steps, num_columns), contiguous
  int64_t steps;
  const void* weights;          // (steps or 1, batch or 1, max(num_predictions, 1) + 1)
  int64_t weights_step_stride;  // 0: the same at every step
  int64_t weights_batch_stride;
  int64_t index;           // the row of every sample,
  const int64_t* indices;  // unless this gives one for all (stride 0) or one a sample (stride 1)
  int64_t indices_stride;
  int64_t* cursor;  // or unless this does, and moves on; see cursor.h. One for all (stride 0) or one a sample
  int64_t cursor_stride;
  void* timestep;  // written with the cursor: the timesteps of the next model call, of every sample once or repeatedly
  TimestepElement timestep_element;
  int64_t timestep_count;

  Noise noise_kind;
  Input noise;           // given
  const int64_t* seeds;  // portable: one for all (stride 0) or one a sample
  int64_t seeds_stride;
  TorchStream torch_stream;
  // Unless null: where mask is 0, the next sample is `known`, noised by known_noise to its level.
  Input mask, known, known_noise;
  // Streams count elements as a contiguous sample holds them. A sample in memory as (inner, channels) is counted as
  // (channels, inner); 1: contiguous.
  int64_t channels;
};

}  // namespace fastguide
