// The CUDA kernels' entry points, for the binding. No torch and no CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/backward.h"

namespace fastguide {
namespace cuda {

// Launches a step on a stream (a cudaStream_t) of a device, and does not wait for it; returns an error's text, or null.
// What makes the weights of a step that has a program is a launch before it, or a part of it: kernels/gpu/joined.h.
const char* launch_step(const StepArguments& arguments, int device, void* stream);

// Launches a step's backward pass in the same way. What its tiles add to the gradients of weights goes to
// grad_weights, (batch, tiles, columns): kernels/gpu/backward.h has the elements of a tile.
const char* launch_step_backward(const StepArguments& arguments, const BackwardArguments& gradients, int device,
                                 void* stream);

// Whether there is a driver that is too old for the CUDA runtime in this library.
bool driver_too_old();

}  // namespace cuda
}  // namespace fastguide
