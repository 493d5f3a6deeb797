// The backward pass of a step: the operator's list of what it has beside a step's arguments, and the plain data that
// kernels get. No torch.
#pragma once

#include "kernels/arguments.h"

namespace fastguide {

// X(type, name) behind a step's own arguments, in the order of fastguide.step.backward.Gradients: the loader compares
// them. The first three come in, the gradients of what the step wrote, and the last; the others go out.
#define FASTGUIDE_GRADIENTS(X) \
  X(OptionalTensor, grad_out) \
  X(OptionalTensor, grad_original) \
  X(OptionalTensor, grad_left) \
  X(OptionalTensor, grad_sample) \
  X(TensorList, grad_predictions) \
  X(OptionalTensor, grad_gradient) \
  X(OptionalTensor, grad_variance) \
  X(OptionalTensor, grad_noise) \
  X(OptionalTensor, grad_anchor) \
  X(OptionalTensor, grad_history) \
  X(OptionalTensor, grad_weights) \
  X(OptionalTensor, clipped)

struct BackwardArguments {
  Input grad_out, grad_original;
  Input grad_left;  // of the history that the step has left: slots times the batch
  Output grad_sample, grad_gradient, grad_variance, grad_noise, grad_anchor;
  Output grad_history;  // of the history that the step has read: slots times the batch
  int slots;
  const Output* grad_predictions;  // one a prediction; null: absent
  double* grad_weights;            // (batch, weight_columns), on a GPU (batch, tiles, weight_columns); null: absent
  const uint8_t* clipped;          // of the CPU's, see below; null: the inputs say it
};

// Where a step has clipped x0, a bit an element, as the elements of a sample lie, the first in the lowest bit of a
// byte. Each sample begins with a byte of its own.
FASTGUIDE_INLINE int64_t clipped_bytes(const StepArguments& a) { return (a.elements_per_sample + 7) / 8; }

// Weights of a sample, as a step reads them.
FASTGUIDE_INLINE int weight_columns(const StepArguments& a) {
  return (a.num_predictions > 1 ? a.num_predictions : 1) + 1;
}

}  // namespace fastguide
