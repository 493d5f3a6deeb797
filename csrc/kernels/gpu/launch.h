// The CUDA kernel's entry point, for the binding. No torch and no CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"

namespace fastguide {
namespace cuda {

// Launches a step, and before it what makes its weights if it has a program, on a stream (a cudaStream_t) of a
// device, and does not wait for it; returns an error's text, or null.
const char* launch_step(const StepArguments& arguments, int device, void* stream);

// Whether there is a driver that is too old for the CUDA runtime in this library.
bool driver_too_old();

}  // namespace cuda
}  // namespace fastguide
