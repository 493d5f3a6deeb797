// A step as plain data, which can be made again with other tensors of the same layouts.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"

namespace fastguide {

// The predictions follow it in memory.
struct Record {
  StepArguments arguments;
  int64_t prediction_bytes;  // from one prediction to the next, if one tensor holds them all; otherwise 0
  int32_t device;
  bool is_cpu;
};

// Calls f(argument, pointer) for the pointer to each tensor that a call may have. The others are of the table, the
// guidance and the cursor, and stay; predictions are apart.
template <typename F>
void for_each_pointer(StepArguments& a, const F& f) {
  for_each_output(a, [&](Argument name, Output& output, int) { f(name, const_cast<const void**>(&output.data)); });
  for_each_input(a, [&](Argument name, Input& input) { f(name, &input.data); });
  f(Argument::indices, reinterpret_cast<const void**>(&a.indices));
  f(Argument::seeds, reinterpret_cast<const void**>(&a.seeds));
}

}  // namespace fastguide
