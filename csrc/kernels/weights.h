// A sample's weights, made from its moments by its program. Host and device, no torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/cursor.h"
#include "maths/inline.h"
#include "maths/program.h"

namespace fastguide {

// Elements of a sample that are added up in the arithmetic's own precision; the sums of such parts are added up in
// double, in order. Parts begin with the sample: its bits depend on nothing but its own elements.
constexpr int64_t kPart = 4096;

FASTGUIDE_INLINE int64_t parts_of(const StepArguments& a) { return (a.elements_per_sample + kPart - 1) / kPart; }

// The weights of so many terms, as a step reads them, with the gradient's scale behind those of the predictions.
FASTGUIDE_INLINE int made_columns(const StepArguments& a) { return a.num_predictions + 1 + (a.weighs_sample ? 1 : 0); }

FASTGUIDE_INLINE int terms_of(const StepArguments& a) { return a.num_predictions + (a.weighs_sample ? 1 : 0); }

FASTGUIDE_INLINE const int32_t* program_of(const StepArguments& a, int64_t sample) {
  return a.program + sample * a.program_stride;
}

// Calls put(n, value) for each of a program's inputs behind the moments, the n-th of its values; returns how many
// inputs there are.
template <typename T, typename Put>
FASTGUIDE_INLINE int put_inputs(const StepArguments& a, int64_t sample, const Position& position, const Put& put) {
  const int64_t index = position.index;
  const Row<T>& row = row_at<T>(a, index);
  int inputs = moments_of(terms_of(a));
#if defined(__CUDA_ARCH__)  // a launch's samples are groups, if there are any
  put(inputs++, double(a.elements_per_sample));
#else
  put(inputs++, double(a.elements_per_sample / a.groups));
#endif
  put(inputs++, double(index - position.first));
  put(inputs++, double(row.x0_scale));
  put(inputs++, double(row.x0_sample));
  put(inputs++, double(row.x0_pred));
  const double* parameters = a.parameters + index * a.parameters_step_stride + sample * a.parameters_batch_stride;
  FASTGUIDE_ROLL
  for (int k = 0; k < a.num_parameters; ++k) put(inputs++, parameters[k]);
  return inputs;
}

// The gradient's scale, which is a constant of weights that are made.
template <typename T>
FASTGUIDE_INLINE T constant_scale(const StepArguments& a, int64_t sample, int64_t index) {
  const T* constants =
      static_cast<const T*>(a.weights) + index * a.weights_step_stride + sample * a.weights_batch_stride;
  return constants[a.num_predictions];
}

// Fills a program's inputs behind the moments, and runs it. values: kMaxValues, the first of them the moments.
template <typename T>
FASTGUIDE_INLINE void make_weights(const StepArguments& a, const int32_t* program, int64_t sample,
                                   const Position& position, double* values, T* weights) {
  const int terms = terms_of(a);
  const int inputs = put_inputs<T>(a, sample, position, [&](int n, double value) { values[n] = value; });
  run_program(program, terms, inputs, values);
  FASTGUIDE_ROLL
  for (int k = 0; k < a.num_predictions; ++k) weights[k] = T(values[program[1 + k]]);
  weights[a.num_predictions] = constant_scale<T>(a, sample, position.index);
  if (a.weighs_sample) weights[a.num_predictions + 1] = T(values[program[1 + a.num_predictions]]);
}

// The same for several groups of one sample, whose weights are not rounded yet; those of the first `count` are written.
template <typename T, int sets>
FASTGUIDE_INLINE void make_weights(const StepArguments& a, const int32_t* program, int64_t sample,
                                   const Position& position, double (*values)[sets], int count, double* weights) {
  const int terms = terms_of(a), columns = made_columns(a);
  const int inputs = put_inputs<T>(a, sample, position, [&](int n, double value) {
    for (int k = 0; k < sets; ++k) values[n][k] = value;
  });
  run_program<sets>(program, terms, inputs, values);
  const double scale = constant_scale<T>(a, sample, position.index);
  for (int k = 0; k < count; ++k, weights += columns) {
    for (int term = 0; term < a.num_predictions; ++term) weights[term] = values[program[1 + term]][k];
    weights[a.num_predictions] = scale;
    if (a.weighs_sample) weights[a.num_predictions + 1] = values[program[terms]][k];
  }
}

}  // namespace fastguide
