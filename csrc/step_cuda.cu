// The CUDA kernels: step_gpu.h's threads in a grid, one kernel for each variant, and their launch. Raw pointers only.
#include <cuda_runtime.h>

#include "step_cuda.h"
#include "step_gpu.h"

namespace fastguide {
namespace cuda {
namespace {

constexpr int kBlocks = 4;  // on a multiprocessor at least: 128 registers a thread, which all variants do with

// Seed and offset, where they are on the device. The last block to have read them moves the offset on for the next
// step; at the kernel's beginning, so that its end does not wait for that.
__device__ TorchStream read_torch_stream(const StepArguments& a) {
  TorchStream stream = a.torch_stream;
  int64_t* state = stream.state;
  if (state == nullptr) return stream;
  stream.seed = uint64_t(state[0]);
  stream.offset = uint64_t(state[1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the block has read comes before its count, and all counts before the writing
    const unsigned long long done = atomicAdd(reinterpret_cast<unsigned long long*>(state + 2), 1ull);
    if (done == gridDim.x - 1) {
      __threadfence();
      state[1] = int64_t(stream.offset + stream.increment);
      state[2] = 0;
    }
  }
  return stream;
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) step_kernel(const __grid_constant__ GpuStep s) {
  step_tile<V>(s, blockIdx.x, threadIdx.x);
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) torch_single_kernel(const __grid_constant__ GpuStep s) {
  torch_single_tile<V>(s, read_torch_stream(s.a), blockIdx.x, threadIdx.x);
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) torch_vector_kernel(const __grid_constant__ GpuStep s) {
  __shared__ float shared[kTorchValues * kVector * kThreads];
  torch_vector_tile<V>(s, read_torch_stream(s.a), blockIdx.x, threadIdx.x, shared);
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
  return s.a.gradient.data != nullptr || s.a.variance.data != nullptr ? choose_noise<predictions, true>(s)
                                                                      : choose_noise<predictions, false>(s);
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
             "update it, or build fastguide from source with an older toolkit";
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

int max_predictions() { return kMaxPredictions; }

}  // namespace cuda
}  // namespace fastguide
