// A guided step's arguments: the operator's list of them, and the plain data that kernels get. No torch.
//
// A tensor that a step gains is a line of FASTGUIDE_ARGUMENTS, a field of StepArguments, and a line of for_each_input
// or for_each_output. All that is done to every tensor alike walks these two.
#pragma once

#include <cstdint>

#include "maths/element.h"
#include "maths/inline.h"

namespace fastguide {

// X(type, name) in the order of fastguide.step.operator.StepArguments: the loader compares them.
#define FASTGUIDE_ARGUMENTS(X) \
  X(Tensor, out) \
  X(OptionalTensor, original) \
  X(OptionalTensor, staged) \
  X(Tensor, sample) \
  X(TensorList, predictions) \
  X(Tensor, rows) \
  X(Tensor, weights) \
  X(Integer, index) \
  X(OptionalTensor, indices) \
  X(OptionalTensor, gradient) \
  X(OptionalTensor, variance) \
  X(OptionalTensor, noise) \
  X(OptionalTensor, seeds) \
  X(OptionalTensor, philox) \
  X(Integer, philox_threads) \
  X(OptionalTensor, cursor) \
  X(OptionalTensor, timestep) \
  X(OptionalTensor, mask) \
  X(OptionalTensor, known) \
  X(OptionalTensor, known_noise) \
  X(OptionalTensor, anchor) \
  X(OptionalTensor, history) \
  X(OptionalTensor, program) \
  X(OptionalTensor, parameters) \
  X(OptionalTensor, made) \
  X(OptionalTensor, scratch) \
  X(OptionalTensor, inverse_thresholds)

enum class Argument : int {
#define FASTGUIDE_ENUMERATOR(type, name) name,
  FASTGUIDE_ARGUMENTS(FASTGUIDE_ENUMERATOR)
#undef FASTGUIDE_ENUMERATOR
};

static inline const char* name_of(Argument argument) {
  switch (argument) {
#define FASTGUIDE_CASE(type, name) \
  case Argument::name: \
    return #name;
    FASTGUIDE_ARGUMENTS(FASTGUIDE_CASE)
#undef FASTGUIDE_CASE
  }
  FASTGUIDE_UNREACHABLE();
}

// A tensor that is dense within a sample; all tensors have the same order of elements. batch_stride counts elements.
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

// The source of the noise z.
enum class Noise : int {
  none,
  given,         // a tensor
  torch_stream,  // the values of torch.randn on a GPU
  portable,      // Philox keyed by the sample's seed
};

// The stream of torch's CUDA generator, from a state on the host or on the device.
struct TorchStream {
  uint64_t seed = 0, offset = 0;
  // Unless null: seed, offset, and the number of blocks that have read them; the last block advances the offset.
  int64_t* state = nullptr;
  uint32_t threads = 0;    // of torch's own kernel for a tensor of this size
  uint64_t increment = 0;  // the amount by which that kernel advances the offset; set by the launch
};

enum class TimestepElement : int { int64, float32 };

// The most predictions of a step on a GPU, where they are parameters of the kernel.
constexpr int kMaxPredictions = 32;

struct StepArguments {
  Output out, original;
  Output staged;  // the next model input: staged_copies times the batch, one after the other
  int staged_copies;
  Output history;  // read too: history_slots times the batch, in the arithmetic's dtype
  int history_slots;
  Input sample, gradient, variance;
  const Input* predictions;
  int num_predictions;
  int64_t batch, elements_per_sample;
  bool double_precision;  // whether rows, weights and the arithmetic are double; otherwise they are float
  const void* rows;       // Row<float> or Row<double>, one for each step
  int64_t steps;
  const void* weights;          // (steps or 1, batch or 1, max(num_predictions, 1) + 1)
  int64_t weights_step_stride;  // 0: the same at every step
  int64_t weights_batch_stride;
  // Unless null, it makes the weights from moments (maths/program.h); of the others, the gradient's scale is left.
  const int32_t* program;
  int64_t program_words, program_stride;  // the stride is 0 for one of all samples
  const double* parameters;               // (steps or 1, batch or 1, num_parameters)
  int num_parameters;
  int64_t parameters_step_stride, parameters_batch_stride;
  double* scratch;     // a GPU's, see kernels/gpu/moments.h and groups.h
  void* made;          // gets the weights: (batch * groups, made_columns)
  bool weighs_sample;  // whether the last of a sample's weights is the sample's own
  // With a program: into how many equal blocks a sample's elements are divided, each of which has moments and weights
  // of its own. `made` has all of them, one after the other.
  int64_t groups = 1;
  // Unless null, it gets 1 over the thresholds of x0 (kernels/thresholds.h), and the step takes them: one a sample, of
  // the arithmetic's type. On a GPU each has the words behind it to work with.
  void* inverse_thresholds;
  int64_t inverse_thresholds_stride;
  int64_t index;           // the row of every sample, unless indices or the cursor give it
  const int64_t* indices;  // one for all (stride 0) or one a sample (stride 1)
  int64_t indices_stride;
  int64_t* cursor;  // advanced by the step, see cursor.h; one for all (stride 0) or one a sample
  int64_t cursor_stride;
  void* timestep;  // written with the cursor: the timesteps of the next model call, of every sample once or repeatedly
  TimestepElement timestep_element;
  int64_t timestep_count;

  Noise noise_kind;
  Input noise;           // if given
  const int64_t* seeds;  // if portable: one for all (stride 0) or one a sample
  int64_t seeds_stride;
  TorchStream torch_stream;
  // Where mask is 0, the next sample is `known`, noised by known_noise to its level.
  Input mask, known, known_noise;
  Input anchor;  // what the last step wrote, where it is not the sample any more
  // Streams count elements in the order of a contiguous sample. A sample that is (inner, channels) in memory is counted
  // as (channels, inner); 1: contiguous.
  int64_t channels;
};

// Calls f(argument, input) for each tensor that is read element by element, but predictions. Absent ones have no data.
template <typename Arguments, typename F>
FASTGUIDE_INLINE void for_each_input(Arguments& a, const F& f) {
  f(Argument::sample, a.sample);
  f(Argument::gradient, a.gradient);
  f(Argument::variance, a.variance);
  f(Argument::noise, a.noise);
  f(Argument::mask, a.mask);
  f(Argument::known, a.known);
  f(Argument::known_noise, a.known_noise);
  f(Argument::anchor, a.anchor);
}

// The same with predictions, which a GPU's launch has in another place.
template <typename F>
FASTGUIDE_INLINE void for_each_input(const StepArguments& a, const Input* predictions, const F& f) {
  for_each_input(a, f);
  FASTGUIDE_ROLL
  for (int k = 0; k < a.num_predictions; ++k) f(Argument::predictions, predictions[k]);
}

// Calls f(argument, output, copies) for each tensor that is written element by element. copies: how many times it holds
// the batch.
template <typename Arguments, typename F>
FASTGUIDE_INLINE void for_each_output(Arguments& a, const F& f) {
  f(Argument::out, a.out, 1);
  f(Argument::original, a.original, 1);
  f(Argument::staged, a.staged, a.staged_copies);
  f(Argument::history, a.history, a.history_slots);
}

// Whether out and original may be this input, element for element. The others are read after an output is written.
static inline bool may_be_output(Argument input) {
  return input == Argument::sample || input == Argument::predictions || input == Argument::gradient ||
         input == Argument::variance || input == Argument::noise;
}

}  // namespace fastguide
