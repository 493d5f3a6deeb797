// The CUDA kernel's entry point, for the binding. No torch and no CUDA headers.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace fastguide {
namespace cuda {

// Starts a step on a stream (a cudaStream_t) of a device, and does not wait for it; returns an error's text, or null.
const char* launch_step(const StepArguments& arguments, int device, void* stream);

// Major versions of CUDA: of the runtime in this library, and what the driver is good for, or 0 if there is no driver.
int runtime_version();
int driver_version();

// The most predictions that a step takes in tensors of their own.
int max_predictions();

}  // namespace cuda
}  // namespace fastguide
