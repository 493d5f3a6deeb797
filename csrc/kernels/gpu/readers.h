// How a launch reads its position and torch's stream, and its last block advances them. Device only, behind CUDA's own
// header.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/cursor.h"
#include "kernels/gpu/count.h"

namespace fastguide {
namespace cuda {

// The stream with its seed and offset, which may be on the device.
static __device__ TorchStream read_torch_stream(const StepArguments& a) {
  TorchStream stream = a.torch_stream;
  if (stream.state == nullptr) return stream;
  stream.seed = uint64_t(stream.state[0]);
  stream.offset = uint64_t(stream.state[1]);
  return stream;
}

// A step advances the cursor and torch's stream on the device, for the next step. noise: what the kernel is compiled
// for; without torch's stream, it has no code for that.
//
// Every block increments `readers` after it has read them. The block that reads last advances them. The atomic is
// issued early, so that its latency overlaps the computation.
template <Noise noise>
static __device__ int64_t* readers_of(const StepArguments& a) {
  if (a.cursor != nullptr) return a.cursor + kCursorReaders;
  return noise == Noise::torch_stream && a.torch_stream.state != nullptr ? a.torch_stream.state + 2 : nullptr;
}

// Returns to the first thread whether this block is the last one that reads; the others get false. `position` and
// `offset` are what a thread has read: the barrier waits until they are there.
template <Noise noise>
static __device__ bool reads_last(const StepArguments& a, const Position& position, uint64_t offset) {
  int64_t* readers = readers_of<noise>(a);
  if (readers == nullptr) return false;
  __syncthreads_or(int(uint64_t(position.index) + uint64_t(position.first) + uint64_t(position.end) + offset));
  if (threadIdx.x != 0) return false;
  return count_released(reinterpret_cast<unsigned*>(readers)) == gridDim.x - 1;
}

// `last` is what reads_last returned. The position and the stream are read again: no register holds them till then.
template <Noise noise>
static __device__ void advance_if(bool last, const StepArguments& a) {
  int64_t* readers = readers_of<noise>(a);
  if (readers == nullptr) return;
  if (last) __threadfence();            // orders all counts before the writes
  if (!__syncthreads_or(last)) return;  // the whole block goes on
  const Position position = position_of(a, 0);
  const TorchStream stream = noise == Noise::torch_stream ? read_torch_stream(a) : TorchStream{};
  __syncthreads();  // each thread has read them
  if (a.cursor != nullptr) advance(a, position, threadIdx.x, blockDim.x);
  if (threadIdx.x != 0) return;
  if (noise == Noise::torch_stream && stream.state != nullptr && draws_from(a, position)) {
    stream.state[1] = int64_t(stream.offset + stream.increment);
  }
  *readers = 0;
}

}  // namespace cuda
}  // namespace fastguide
