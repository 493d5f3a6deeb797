// Draws normal values as torch.Tensor.normal_ does on the CPU, from the bytes of a generator's state.
#pragma once

#include <cstdint>

namespace fastguide {

constexpr int64_t kStateBytes = 5056;  // of torch.Generator.get_state(), on the CPU

// Draws `count` values of torch's float32 stream, and moves the state on as torch does; to: null, if they are only
// passed over. False, and nothing is done: torch draws so few in another way, the state is none that torch has
// written, or the processor or the selected instruction set has no AVX2.
bool draw_torch_stream(void* state, float* to, int64_t count);

}  // namespace fastguide
