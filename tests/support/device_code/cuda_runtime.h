// Replaces CUDA's header of this name, so that a host compiler compiles csrc/kernels/gpu/step.cu unchanged.
//
// A launch is a loop over blocks and threads (in device_code.cpp). Thread 0 runs last in its block: what it does behind
// a barrier then comes after what the others do before it. That a vote waits for what it is given, that the last block
// has read before it writes, and that its threads share its work: all this is left to the interpreter of PTX.
#pragma once

#include <cstddef>
#include <utility>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x_ = 1) : x(x_) {}
};

static dim3 blockIdx, threadIdx, gridDim;
static const dim3 blockDim;  // 1: what a block shares out, thread 0 does

static void __syncthreads() {}
static int __syncthreads_or(int value) { return value; }
static void __threadfence() {}

static unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}

static unsigned atomicMax(unsigned* to, unsigned value) {
  const unsigned before = *to;
  if (value > before) *to = value;
  return before;
}

static unsigned atomicExch(unsigned* to, unsigned value) { return std::exchange(*to, value); }

enum cudaError_t {
  cudaSuccess,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorInsufficientDriver,
  cudaErrorUnknown,
};
using cudaStream_t = void*;

static cudaError_t refusal = cudaSuccess;  // of the next launches

#define CUDART_VERSION 13000
static int driver = 0;  // the version that the driver supports
static cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return refusal;
}

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
static cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
static cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

static int current_device = 0;
static cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}

// Devices 1 and 2 have clusters, and run the code that has them; 2 has no room for any.
struct cudaFuncAttributes {
  int ptxVersion;
};
static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = current_device == 0 ? 80 : 90;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
static cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = current_device == 2 ? 0 : 1;
  return cudaSuccess;
}
static cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void** parameters);

static const char* cudaGetErrorString(cudaError_t) { return "another error"; }
static cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** parameters, size_t shared,
                                    cudaStream_t stream);
