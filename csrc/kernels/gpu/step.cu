// The CUDA kernels: thread.h's threads in a grid, one kernel for each variant, and their launch. Raw pointers only.
#include <cuda_runtime.h>

#include "kernels/gpu/launch.h"
#include "kernels/gpu/thread.h"

namespace fastguide {
namespace cuda {
namespace {

constexpr int kBlocks = 4;  // on a multiprocessor at least: 128 registers a thread, which all variants do with

// Seed and offset, where they are on the device.
__device__ TorchStream read_torch_stream(const StepArguments& a) {
  TorchStream stream = a.torch_stream;
  if (stream.state == nullptr) return stream;
  stream.seed = uint64_t(stream.state[0]);
  stream.offset = uint64_t(stream.state[1]);
  return stream;
}

// What a step moves on, on the device: the cursors and torch's stream, for the next step. The last block to have read
// them does; all count when they have read, at their beginning, and the count is on its way while they compute.
__device__ int64_t* readers_of(const StepArguments& a) {
  if (a.cursor != nullptr) return a.cursor + kCursorReaders;
  return a.torch_stream.state != nullptr ? a.torch_stream.state + 2 : nullptr;
}

__device__ unsigned count_reader(const StepArguments& a) {  // the first thread's: how many blocks have read before
  int64_t* readers = readers_of(a);
  if (readers == nullptr) return 0;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  __threadfence();  // what the block has read comes before its count
  return atomicAdd(reinterpret_cast<unsigned*>(readers), 1u);
}

__device__ void move_on(const StepArguments& a, const TorchStream& stream, const Position& position, unsigned before) {
  int64_t* readers = readers_of(a);
  if (readers == nullptr || int(threadIdx.x) >= warpSize) return;  // the first warp is left
  if (__shfl_sync(0xFFFFFFFFu, before, 0) != gridDim.x - 1) return;
  __threadfence();  // and all counts before the writing
  if (a.cursor != nullptr) advance(a, position, threadIdx.x, warpSize);
  if (threadIdx.x != 0) return;
  if (stream.state != nullptr && draws_from(a, position)) stream.state[1] = int64_t(stream.offset + stream.increment);
  *readers = 0;
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) step_kernel(const __grid_constant__ GpuStep s) {
  const Position position = position_of(s.a, sample_of(s, blockIdx.x));
  const unsigned before = count_reader(s.a);
  step_tile<V>(s, position, blockIdx.x, threadIdx.x);
  move_on(s.a, TorchStream{}, position, before);
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) torch_single_kernel(const __grid_constant__ GpuStep s) {
  const Position position = position_of(s.a, sample_of(s, blockIdx.x));
  const TorchStream stream = read_torch_stream(s.a);
  const unsigned before = count_reader(s.a);
  torch_single_tile<V>(s, stream, position, blockIdx.x, threadIdx.x);
  move_on(s.a, stream, position, before);
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) torch_vector_kernel(const __grid_constant__ GpuStep s) {
  __shared__ float shared[kTorchValues * kVector * kThreads];
  const Position position = position_of(s.a, 0);
  const TorchStream stream = read_torch_stream(s.a);
  const unsigned before = count_reader(s.a);
  torch_vector_tile<V>(s, stream, position, blockIdx.x, threadIdx.x, shared);
  move_on(s.a, stream, position, before);
}

using Kernel = void (*)(GpuStep);

template <int predictions, bool extras, Noise noise, bool original>
Kernel choose_staged(const GpuStep& s) {
  if constexpr (noise == Noise::torch_stream) {
    if (torch_vectors_fit(s)) {
      return s.a.staged.data != nullptr
                 ? Kernel(torch_vector_kernel<Variant<predictions, extras, noise, original, true>>)
                 : Kernel(torch_vector_kernel<Variant<predictions, extras, noise, original, false>>);
    }
    // The small tensors of this stream are bound by latency: gradient and variance cost nothing there.
    return s.a.staged.data != nullptr ? Kernel(torch_single_kernel<Variant<predictions, true, noise, original, true>>)
                                      : Kernel(torch_single_kernel<Variant<predictions, true, noise, original, false>>);
  } else {
    return s.a.staged.data != nullptr ? Kernel(step_kernel<Variant<predictions, extras, noise, original, true>>)
                                      : Kernel(step_kernel<Variant<predictions, extras, noise, original, false>>);
  }
}

template <int predictions, bool extras, Noise noise>
Kernel choose_original(const GpuStep& s) {
  return s.a.original.data != nullptr ? choose_staged<predictions, extras, noise, true>(s)
                                      : choose_staged<predictions, extras, noise, false>(s);
}

template <int predictions, bool extras>
Kernel choose_noise(const GpuStep& s) {
  switch (s.a.noise_kind) {
    case Noise::torch_stream:
      return choose_original<predictions, extras, Noise::torch_stream>(s);
    case Noise::portable:
      return choose_original<predictions, extras, Noise::portable>(s);
    default:
      return choose_original<predictions, extras, Noise::given>(s);
  }
}

template <int predictions>
Kernel choose_extras(const GpuStep& s) {
  const StepArguments& a = s.a;
  const bool extras = a.gradient.data != nullptr || a.variance.data != nullptr || a.mask.data != nullptr;
  return extras ? choose_noise<predictions, true>(s) : choose_noise<predictions, false>(s);
}

Kernel choose_kernel(const GpuStep& s) {
  switch (s.a.num_predictions) {
    case 1:
      return choose_extras<1>(s);
    case 2:
      return choose_extras<2>(s);
    default:
      return choose_extras<0>(s);
  }
}

const char* text_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return nullptr;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "the library has no code for this GPU; fastguide info says which it has";
    case cudaErrorInsufficientDriver:
      return "the driver is older than the CUDA runtime that this library was built with; "
             "update it, take backend='triton', or build fastguide from source with an older toolkit";
    default:
      return cudaGetErrorString(error);
  }
}

}  // namespace

const char* launch_step(const StepArguments& arguments, int device, void* stream) {
  GpuStep s = gpu_step(arguments);
  // This library has its own copy of the CUDA runtime, which has to be told what torch's knows.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return text_of(error);
  void* parameters[] = {&s};
  if (s.tiles > kMaxTiles) return "more samples than one launch has blocks for";
  const dim3 blocks(static_cast<unsigned>(s.tiles));
  const void* kernel = reinterpret_cast<const void*>(choose_kernel(s));
  return text_of(cudaLaunchKernel(kernel, blocks, dim3(kThreads), parameters, 0, static_cast<cudaStream_t>(stream)));
}

bool driver_too_old() {
  int version = 0;  // 1000 times the major version of CUDA that the driver is good for; 0 without one
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return false;
  return version / 1000 < CUDART_VERSION / 1000;
}

int max_predictions() { return kMaxPredictions; }

}  // namespace cuda
}  // namespace fastguide
