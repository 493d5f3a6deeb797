// The CUDA kernel that makes the weights of a step: moments of every part of every sample, and then the program.
//
// A block adds up one part of one sample, see kernels/weights.h. The last block of a sample adds its parts, in order,
// and runs the program in one thread. So bits depend on the sample alone, and on no launch.
#include <cuda_runtime.h>

#include "kernels/cursor.h"
#include "kernels/gpu/count.h"
#include "kernels/gpu/launch.h"
#include "kernels/gpu/moments.h"
#include "kernels/gpu/vector.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {
namespace cuda {
namespace {

constexpr int kVectorsOfThread = kPart / (kMomentThreads * kVector);
static_assert(kVectorsOfThread * kMomentThreads * kVector == kPart, "the threads of a block share a part out");

// One element of all terms.
template <int terms>
__device__ void add_element(float (&t)[terms], bool weighs_sample, float (&sums)[moments_of(terms)]) {
  FASTGUIDE_UNROLL
  for (int k = 1; k < terms; ++k) {
    if (k < terms - 1 || !weighs_sample) t[k] -= t[0];
  }
  int n = 0;
  FASTGUIDE_UNROLL
  for (int i = 0; i < terms; ++i) {
    FASTGUIDE_UNROLL
    for (int j = i; j < terms; ++j) {
      sums[n] = fused(t[i], t[j], sums[n]);
      ++n;
    }
  }
  FASTGUIDE_UNROLL
  for (int k = 0; k < terms; ++k) sums[n++] += t[k];
}

template <int terms>
__device__ void add_elements(const MomentsLaunch& launch, int64_t sample, int64_t place, int64_t end,
                             float (&sums)[moments_of(terms)]) {
  const bool weighs_sample = launch.a.weighs_sample;
  if (launch.aligned && place + kVector <= end) {
    float values[terms][kVector];
    FASTGUIDE_UNROLL
    for (int k = 0; k < terms; ++k) {
      unpack(load_raw(launch.terms[k], sample, place), launch.terms[k].element, values[k]);
    }
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      float t[terms];
      FASTGUIDE_UNROLL
      for (int k = 0; k < terms; ++k) t[k] = values[k][i];
      add_element<terms>(t, weighs_sample, sums);
    }
    return;
  }
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector && place + i < end; ++i) {
    float t[terms];
    FASTGUIDE_UNROLL
    for (int k = 0; k < terms; ++k) {
      t[k] = value_of(load_bits(launch.terms[k], sample, place + i), launch.terms[k].element);
    }
    add_element<terms>(t, weighs_sample, sums);
  }
}

// Leaves the block's sum in totals, for all threads behind the barrier: of a warp's lanes by halves, and of the warps
// in order. On a host, whose threads run one after the other and thread 0 last, that thread alone has it.
template <int count>
__device__ void add_threads(const float (&sums)[count], double (&warps)[kMomentWarps][count], double* totals) {
#if defined(__CUDA_ARCH__)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  FASTGUIDE_UNROLL
  for (int n = 0; n < count; ++n) {
    double value = double(sums[n]);
    FASTGUIDE_UNROLL
    for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, half);
    if (lane == 0) warps[warp][n] = value;
  }
  __syncthreads();
  for (int n = threadIdx.x; n < count; n += kMomentThreads) {
    double total = warps[0][n];
    FASTGUIDE_UNROLL
    for (int k = 1; k < kMomentWarps; ++k) total += warps[k][n];
    totals[n] = total;
  }
#else
  for (int n = 0; n < count; ++n) {
    warps[0][n] += double(sums[n]);
    if (threadIdx.x != 0) continue;
    totals[n] = warps[0][n];
    warps[0][n] = 0.0;  // for the next block
  }
#endif
}

// Whether this is the last block of its sample: then what the others have written is there for it.
__device__ bool is_last_of_sample(const MomentsLaunch& launch, int64_t sample) {
  __syncthreads();  // what all threads have written comes before the count
  bool last = false;
  if (threadIdx.x == 0) {
    unsigned* blocks = reinterpret_cast<unsigned*>(counters_of(launch.a) + sample);
    last = count_released(blocks) == unsigned(parts_of(launch.a)) - 1;
    if (last) {
      *blocks = 0;  // for the next launch
      __threadfence();
    }
  }
  return __syncthreads_or(last);
}

// Copies a sample's program, so that no word of it leads out of the values: nobody has checked a program on a device.
__device__ void copy_program(const StepArguments& a, int64_t sample, int terms, int inputs, int32_t* program) {
  const int32_t* from = program_of(a, sample);
  const int most = kMaxValues - inputs;
  const int instructions = from[0] < 0 ? 0 : from[0] < most ? from[0] : most;
  const int words = int(words_of(terms, instructions));
  for (int k = threadIdx.x; k < words; k += blockDim.x) {
    const int32_t word = k < a.program_words ? from[k] : 0;
    const bool is_operation = k > terms && (k - terms - 1) % kInstructionWords == 0;
    const unsigned operations = unsigned(Operation::count);
    program[k] = k == 0         ? instructions
                 : is_operation ? int32_t(unsigned(word) < operations ? unsigned(word) : 0u)
                                : int32_t(unsigned(word) % unsigned(kMaxValues));
  }
}

// Writes a sample's weights in the order in which the step reads them, where the sample's own is that of one more
// prediction.
__device__ void reorder_weights(const StepArguments& a, int64_t sample) {
  const int count = a.num_predictions, columns = made_columns(a);
  const float* made = static_cast<const float*>(a.made) + sample * columns;
  float* read = step_weights_of(a) + sample * columns;
  const float of_sample = made[count + 1];
  read[0] = made[0] + of_sample;
  for (int k = 1; k < count; ++k) read[k] = made[k];
  read[count] = of_sample;
  read[count + 1] = made[count];
}

// The least number of blocks on a multiprocessor: what is added up stays in registers.
constexpr int least_blocks(int terms) { return terms <= 3 ? 4 : 3; }

template <int terms>
__global__ void __launch_bounds__(kMomentThreads, least_blocks(terms))
    moments_kernel(const __grid_constant__ MomentsLaunch launch) {
  constexpr int kMoments = moments_of(terms);
  __shared__ double warps[kMomentWarps][kMoments];
  __shared__ double values[kMaxValues];
  __shared__ int32_t program[kMaxWords];
  const StepArguments& a = launch.a;
  const int64_t parts = parts_of(a), sample = blockIdx.x / parts, part = blockIdx.x - sample * parts;
  Position position = position_of(a, sample);
  if (!is_live(a, position)) return;
  float sums[kMoments] = {};
  const int64_t begin = part * kPart, size = a.elements_per_sample, end = begin + kPart < size ? begin + kPart : size;
  FASTGUIDE_ROLL
  for (int k = 0; k < kVectorsOfThread; ++k) {
    const int64_t place = begin + (int64_t(k) * kMomentThreads + threadIdx.x) * kVector;
    if (place < end) add_elements<terms>(launch, sample, place, end, sums);
  }
  add_threads<kMoments>(sums, warps, values);
  double* written = sums_of(a) + (sample * parts + part) * kMoments;
  for (int n = threadIdx.x; n < kMoments; n += blockDim.x) written[n] = values[n];
  if (!is_last_of_sample(launch, sample)) return;
  const double* read = sums_of(a) + sample * parts * kMoments;
  for (int n = threadIdx.x; n < kMoments; n += blockDim.x) {
    double total = read[n];
    for (int64_t k = 1; k < parts; ++k) total += read[k * kMoments + n];
    values[n] = total;
  }
  const int inputs = kMoments + kOtherInputs + a.num_parameters;
  copy_program(a, sample, terms, inputs, program);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (!in_table(a, position)) position.index = 0;  // the step makes such a sample NaN
  make_weights<float>(a, program, sample, position, values, static_cast<float*>(a.made) + sample * made_columns(a));
  if (a.weighs_sample) reorder_weights(a, sample);
}

using MomentsKernel = void (*)(MomentsLaunch);

MomentsKernel choose_moments(int terms) {
  static constexpr MomentsKernel kKernels[kMaxTerms - 1] = {
      moments_kernel<2>,
      moments_kernel<3>,
      moments_kernel<4>,
  };
  return kKernels[terms - 2];
}

}  // namespace

cudaError_t launch_moments(const StepArguments& a, cudaStream_t stream) {
  MomentsLaunch launch = make_moments_launch(a);
  void* parameters[] = {&launch};
  const void* kernel = reinterpret_cast<const void*>(choose_moments(terms_of(a)));
  const dim3 blocks(static_cast<unsigned>(a.batch * parts_of(a)));
  return cudaLaunchKernel(kernel, blocks, dim3(kMomentThreads), parameters, 0, stream);
}

}  // namespace cuda
}  // namespace fastguide
