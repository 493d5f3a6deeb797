// A step whose arguments are plain data already: its last checks, and the kernel.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/backward.h"

namespace fastguide {

constexpr int64_t kGrain = 32768;  // the least number of elements a thread, as in torch's elementwise operators

// Checks what can differ between two steps whose tensors have the same layouts: positions, and memory that is shared.
// Throws.
void check(const StepArguments& a, bool is_cpu);

// Makes a step that was checked. Throws if a GPU refuses it.
void run(const StepArguments& a, bool is_cpu, int32_t device);

// Makes the backward pass of a step that was checked and has elements, on a GPU. Throws if it is refused.
void run_backward_on_gpu(const StepArguments& a, const BackwardArguments& b, int32_t device);

// Makes a step that has elements, on the CPU.
void run_on_cpu(const StepArguments& a);

}  // namespace fastguide
