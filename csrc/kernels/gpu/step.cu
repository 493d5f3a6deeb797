// The CUDA kernels: a grid of tiles.h's threads, one kernel for each variant, and the launch. Raw pointers only.
#include <cuda_runtime.h>

#include "kernels/gpu/backward.h"
#include "kernels/gpu/groups.h"
#include "kernels/gpu/joined.h"
#include "kernels/gpu/launch.h"
#include "kernels/gpu/make_launch.h"
#include "kernels/gpu/moments.h"
#include "kernels/gpu/parameters.h"
#include "kernels/gpu/readers.h"
#include "kernels/gpu/tiles.h"

namespace fastguide {
namespace cuda {

// Launches what makes a step's weights, and in a joined launch the step; and how many blocks of a sample can wait for
// each other on a device: moments.cu.
cudaError_t launch_moments(const MomentsLaunch& launch, cudaStream_t stream);
int most_blocks_of_sample(int device);
// Launches what makes the guided prediction of a step whose groups of elements have weights of their own, and the step
// too where it has the code: groups.cu.
cudaError_t launch_groups(const GroupsLaunch& launch, cudaStream_t stream);
// Launches what finds the thresholds of a step whose weights are made: thresholds.cu.
cudaError_t launch_thresholds(const StepArguments& a, cudaStream_t stream);
// Launches the backward pass: backward.cu.
cudaError_t launch_backward(const BackwardLaunch& launch, cudaStream_t stream);

namespace {

constexpr int kBlocks = 4;  // the least number on a multiprocessor: at most 128 registers a thread

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) step_kernel(const __grid_constant__ Launch launch) {
  const uint32_t sample = sample_of(launch, blockIdx.x);
  const Position position = position_of(launch.a, sample);
  const Vectors<V> vectors = load_vectors<V>(launch, sample, blockIdx.x, threadIdx.x);
  const bool last = reads_last<V::noise>(launch.a, position, 0);
  step_tile<V>(launch, vectors, position, threadIdx.x);
  advance_if<V::noise>(last, launch.a);
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) torch_single_kernel(const __grid_constant__ Launch launch) {
  const uint32_t sample = sample_of(launch, blockIdx.x);
  const Position position = position_of(launch.a, sample);
  const TorchStream stream = read_torch_stream(launch.a);
  const Single single = load_torch_single<V>(launch, sample, blockIdx.x, threadIdx.x);
  const bool last = reads_last<V::noise>(launch.a, position, stream.offset);
  step_torch_single<V>(launch, single, stream, position);
  advance_if<V::noise>(last, launch.a);
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) torch_vector_kernel(const __grid_constant__ Launch launch) {
  __shared__ float shared[kTorchValues * kVector * kThreads];
  const Position position = position_of(launch.a, 0);
  const TorchStream stream = read_torch_stream(launch.a);
  const bool last = reads_last<V::noise>(launch.a, position, stream.offset);
  torch_vector_tile<V>(launch, stream, position, blockIdx.x, threadIdx.x, shared);
  advance_if<V::noise>(last, launch.a);
}

using Kernel = void (*)(Launch);

template <int predictions, Extras extras, Noise noise, bool original, bool staged>
Kernel choose_kind(const Launch& launch) {
  if constexpr (noise == Noise::torch_stream) {
    if constexpr (torch_vectors_compiled(predictions, extras)) {
      if (torch_vectors_fit(launch)) return torch_vector_kernel<Variant<predictions, extras, noise, original, staged>>;
    }
    // Steps of such small tensors are bound by latency: plain kernels would not be faster.
    return torch_single_kernel<Variant<predictions, Extras::any, noise, true, true>>;
  } else {
    constexpr Extras compiled = extras == Extras::others ? Extras::any : extras;
    return step_kernel<Variant<predictions, compiled, noise, original, staged>>;
  }
}

template <int predictions, Extras extras, Noise noise>
Kernel choose_outputs(const Launch& launch) {
  if constexpr (extras == Extras::none) {
    const bool original = launch.a.original.data != nullptr, staged = launch.a.staged.data != nullptr;
    if (!original && !staged) return choose_kind<predictions, extras, noise, false, false>(launch);
    if (!original) return choose_kind<predictions, extras, noise, false, true>(launch);
    if (!staged) return choose_kind<predictions, extras, noise, true, false>(launch);
    // Both are rare: a kernel that looks for them has as many vectors, and its code is there anyway.
    constexpr Extras looks = predictions > 0 ? Extras::history : extras;
    return choose_kind<predictions, looks, noise, true, true>(launch);
  } else {
    return choose_kind<predictions, extras, noise, true, true>(launch);
  }
}

template <int predictions, Extras extras>
Kernel choose_noise(const Launch& launch) {
  switch (launch.a.noise_kind) {
    case Noise::torch_stream:
      return choose_outputs<predictions, extras, Noise::torch_stream>(launch);
    case Noise::portable:
      return choose_outputs<predictions, extras, Noise::portable>(launch);
    case Noise::none:
      return choose_outputs<predictions, extras, has_others(extras) ? Noise::given : Noise::none>(launch);
    case Noise::given:
      return choose_outputs<predictions, extras, Noise::given>(launch);
  }
  FASTGUIDE_UNREACHABLE();
}

template <int predictions>
Kernel choose_extras(const Launch& launch) {
  switch (extras_of(launch.a)) {
    case Extras::none:
      return choose_noise<predictions, Extras::none>(launch);
    case Extras::history:
      if constexpr (predictions > 0) return choose_noise<predictions, Extras::history>(launch);
      break;  // extras_of has made it any
    case Extras::others:
      return choose_noise<predictions, Extras::others>(launch);
    case Extras::any:
      return choose_noise<predictions, Extras::any>(launch);
  }
  FASTGUIDE_UNREACHABLE();
}

Kernel choose_kernel(const Launch& launch) {
  switch (launch.a.num_predictions) {
    case 1:
      return choose_extras<1>(launch);
    case 2:
      return choose_extras<2>(launch);
    default:
      return choose_extras<0>(launch);
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

// The first launch of a kernel loads its code, which a capture forbids in any other mode. What is launched is captured
// all the same.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

const char* launch_step(const StepArguments& arguments, int device, void* stream) {
  const RelaxedCapture relaxed;
  // This library has its own copy of the CUDA runtime, which does not know the device that torch has set.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return text_of(error);
  if (arguments.program != nullptr && arguments.groups > 1) {
    const GroupsLaunch groups = make_groups_launch(arguments);
    if (groups.blocks > kMaxTiles) return "more groups than one launch has blocks for";
    Input guided;
    error = launch_groups(groups, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess || groups.steps) return text_of(error);
    return launch_step(with_guided_prediction(arguments, &guided), device, stream);
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const bool prepares = arguments.program != nullptr || arguments.inverse_thresholds != nullptr;
  if (prepares && arguments.batch * parts_of(arguments) > kMaxTiles)
    return "more samples than one launch has blocks for";
  Input predictions[kMaxTerms];
  const StepArguments step = arguments.program != nullptr ? with_made_weights(arguments, predictions) : arguments;
  Launch launch = make_launch(step);
  if (arguments.program != nullptr) {
    const bool joined =
        can_join(arguments, launch) &&
        (parts_of(arguments) == 1 || blocks_of_sample(arguments) <= uint32_t(most_blocks_of_sample(device)));
    error = launch_moments(joined ? make_joined_launch(arguments, launch) : make_moments_launch(arguments), on);
    if (error != cudaSuccess || joined) return text_of(error);
  }
  if (step.inverse_thresholds != nullptr) {
    error = launch_thresholds(step, on);
    if (error != cudaSuccess) return text_of(error);
  }
  void* parameters[] = {&launch};
  if (launch.tiles > kMaxTiles) return "more samples than one launch has blocks for";
  const dim3 blocks(static_cast<unsigned>(launch.tiles));
  const void* kernel = reinterpret_cast<const void*>(choose_kernel(launch));
  return text_of(cudaLaunchKernel(kernel, blocks, dim3(kThreads), parameters, 0, on));
}

const char* launch_step_backward(const StepArguments& arguments, const BackwardArguments& gradients, int device,
                                 void* stream) {
  const RelaxedCapture relaxed;
  const cudaError_t error = cudaSetDevice(device);  // as in launch_step
  if (error != cudaSuccess) return text_of(error);
  const BackwardLaunch launch = make_backward_launch(arguments, gradients);
  if (launch.tiles > kMaxTiles) return "more samples than one launch has blocks for";
  return text_of(launch_backward(launch, static_cast<cudaStream_t>(stream)));
}

bool driver_too_old() {
  int version = 0;  // 1000 times the major version of CUDA that the driver supports; 0 without a driver
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return false;
  return version / 1000 < CUDART_VERSION / 1000;
}

}  // namespace cuda
}  // namespace fastguide
