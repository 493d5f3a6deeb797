// The CUDA kernel that makes the guided prediction of samples whose groups of elements, such as tokens, have weights of
// their own: norms and inner products of each group's two predictions, its program, and what the weights make of them.
//
// Some lanes of a warp have a group, or a block has one. They add up vectors that begin with the group, in an order
// that depends on nothing but its size, and all is in double: what nearly cancels is divided by its norm (the CPU's
// kernel is in double there alone). One place of the code reads the elements, in two passes, of which the second mostly
// finds them in the cache.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cursor.h"
#include "kernels/gpu/groups.h"
#include "kernels/gpu/launch.h"
#include "kernels/gpu/moments.h"
#include "kernels/gpu/vector.h"
#include "kernels/weights.h"
#include "maths/program.h"
#include "maths/step.h"

namespace fastguide {
namespace cuda {
namespace {

struct Shared {
  double values[kGroupValues];                // launch.values of each group, the moments first
  double sums[kPairProducts][kGroupThreads];  // of the lanes of a group or warp
  int32_t program[kMaxWords];
};

// Calls f(thread) for this thread, and waits for the others; on a host, whose threads run one after the other and
// thread 0 last, for each of them then.
template <typename F>
__device__ void each_thread(const F& f) {
#if defined(__CUDA_ARCH__)
  f(int(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kGroupThreads; ++thread) f(thread);
#endif
}

// A thread's part of its group, whose elements are counted from its first one.
struct Lane {
  Input first, second;  // predictions
  Output guided;
  int group, lane;  // counted within the block, and within the group
  bool active;      // whether there is such a group
  bool aligned;     // whether it begins at 16 bytes in every tensor
};

__device__ Lane lane_of(const GroupsLaunch& launch, int64_t sample, int64_t first, int thread) {
  Lane l;
  l.group = thread >> launch.lane_bits;
  l.lane = thread - (l.group << launch.lane_bits);
  l.active = l.group < launch.groups && first + l.group < launch.groups_of_sample;
  const int64_t begin = (first + l.group) * launch.a.elements_per_sample;
  l.first = {address(launch.predictions[0], sample, begin), 0, launch.predictions[0].element};
  l.second = {address(launch.predictions[1], sample, begin), 0, launch.predictions[1].element};
  l.guided = {launch.guided + sample * launch.guided_stride + begin, 0, Element::float32};
  const auto place = [](const auto& tensor) { return reinterpret_cast<uint64_t>(tensor.data); };
  l.aligned = (place(l.first) | place(l.second) | place(l.guided)) % 16 == 0;
  return l;
}

// ---- Elements ----

// A vector of each prediction, of which so many elements are the group's, and the others 0.
struct Values {
  float first[kVector], second[kVector];
};

// Takes the first of some values, and moves the others up. A loop of such turns needs no copy of its code for each
// element, and no index that would put the values into memory.
__device__ float turned(float (&values)[kVector], float last) {
  const float first = values[0];
  FASTGUIDE_UNROLL
  for (int i = 1; i < kVector; ++i) values[i - 1] = values[i];
  values[kVector - 1] = last;
  return first;
}

__device__ float single(const Input& input, int place, bool inside) {
  return inside ? value_of(load_bits(input, 0, place), input.element) : 0.0f;
}

__device__ void load_values(const Lane& l, int place, int count, Values& values) {
  if (l.aligned && count == kVector) {
    const Raw first = load_raw(l.first, 0, place), second = load_raw(l.second, 0, place);
    unpack(first, l.first.element, values.first);
    unpack(second, l.second.element, values.second);
    return;
  }
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector; ++i) {
    turned(values.first, single(l.first, place + i, i < count));
    turned(values.second, single(l.second, place + i, i < count));
  }
}

// ---- Moments ----

__device__ void add_products(const Values& values, double (&sums)[kPairProducts]) {
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const double base = double(values.first[i]), difference = double(values.second[i]) - base;
    sums[0] = fused(base, base, sums[0]);
    sums[1] = fused(base, difference, sums[1]);
    sums[2] = fused(difference, difference, sums[2]);
  }
}

// Leaves the sums of a group's lanes, or of a warp's, by halves.
__device__ void put_sums(const GroupsLaunch& launch, int thread, double (&sums)[kPairProducts], Shared& shared) {
  const int bits = launch.lane_bits < 5 ? launch.lane_bits : 5, part = thread >> bits;
  const bool is_first = part << bits == thread;
#if defined(__CUDA_ARCH__)
  const bool writes = is_first;
  FASTGUIDE_ROLL
  for (int half = (1 << bits) / 2; half > 0; half /= 2) {
    FASTGUIDE_UNROLL
    for (double& sum : sums) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, half);
  }
#else
  const bool writes = true;
  for (int n = 0; n < kPairProducts && !is_first; ++n) sums[n] += shared.sums[n][part];
#endif
  FASTGUIDE_UNROLL
  for (int n = 0; n < kPairProducts && writes; ++n) shared.sums[n][part] = sums[n];
}

// ---- Weights ----

// Copies a sample's program, so that no word of it leads out of the values: nobody has checked a program on a device.
__device__ void copy_program(const GroupsLaunch& launch, int64_t sample, int thread, int32_t* program) {
  const StepArguments& a = launch.a;
  const int32_t* from = program_of(a, sample);
  const int most = launch.values - (moments_of(2) + kOtherInputs + a.num_parameters);
  const int instructions = from[0] < 0 ? 0 : from[0] < most ? from[0] : most;
  const int words = int(words_of(2, instructions));
  FASTGUIDE_ROLL
  for (int k = thread; k < words; k += kGroupThreads) {
    const uint32_t word = k < a.program_words ? uint32_t(from[k]) : 0u;
    const bool is_operation = k > 2 && (k - 3) % kInstructionWords == 0;
    const uint32_t limit = is_operation ? uint32_t(Operation::count) : uint32_t(launch.values);
    program[k] = k == 0 ? instructions : int32_t(word < limit ? word : 0u);
  }
}

// Makes a group's weights. Sums of its predictions are not known here.
__device__ void weigh(const GroupsLaunch& launch, int64_t sample, const Position& position, int64_t first, int group,
                      Shared& shared) {
  const int parts = launch.lane_bits > 5 ? 1 << (launch.lane_bits - 5) : 1;
  double* const values = shared.values + group * launch.values;
  FASTGUIDE_ROLL
  for (int n = 0; n < moments_of(2); ++n) {
    values[n] = n < kPairProducts ? shared.sums[n][group * parts] : NAN;
    FASTGUIDE_ROLL
    for (int k = 1; n < kPairProducts && k < parts; ++k) values[n] += shared.sums[n][group * parts + k];
  }
  make_weights<float>(
      launch.a, shared.program, sample, position, values,
      static_cast<float*>(launch.a.made) + (sample * launch.groups_of_sample + first + group) * made_columns(launch.a));
}

// ---- The guided prediction ----

__device__ void guide(const Lane& l, int place, int count, const PairWeights<double>& weights, const Values& values) {
  float m[kVector];
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    m[i] = float(guided_prediction(weights, double(values.first[i]), double(values.second[i])));
  }
  if (l.aligned && count == kVector) return store_vector(m, l.guided, 0, place);
  FASTGUIDE_ROLL
  for (int i = 0; i < count; ++i) store_one(turned(m, 0.0f), l.guided, 0, place + i);
}

// ---- The kernel ----

// Adds up the products of a thread's elements, or guides them.
__device__ void pass_over(const GroupsLaunch& launch, const Lane& l, bool guides, int thread, Shared& shared) {
  double sums[kPairProducts] = {};
  const int size = int(launch.a.elements_per_sample), step = kVector << launch.lane_bits;
  const double* of_group = shared.values + l.group * launch.values;
  PairWeights<double> weights{};
  if (guides && l.active) weights = {of_group[shared.program[1]], of_group[shared.program[2]]};
  FASTGUIDE_ROLL
  for (int done = l.lane * kVector; l.active && done < size; done += step) {
    const int count = size - done < kVector ? size - done : kVector;
    Values values = {};
    load_values(l, done, count, values);
    if (guides) {
      guide(l, done, count, weights, values);
    } else {
      add_products(values, sums);
    }
  }
  if (!guides) put_sums(launch, thread, sums, shared);
}

__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks)
    groups_kernel(const __grid_constant__ GroupsLaunch launch) {
  __shared__ Shared shared;
#if !defined(__CUDA_ARCH__)
  if (threadIdx.x != 0) return;  // it does all
#endif
  const StepArguments& a = launch.a;
  const uint32_t sample = quotient(blockIdx.x, launch.chunks);
  const int64_t first = int64_t(blockIdx.x - sample * launch.chunks.divisor) * launch.groups;
  Position position = position_of(a, sample);
  if (!is_live(a, position)) return;
  if (!in_table(a, position)) position.index = 0;  // the step makes such a sample NaN
  FASTGUIDE_ROLL
  for (int pass = 0; pass < 2; ++pass) {
    each_thread([&](int thread) {
      if (pass == 0) copy_program(launch, sample, thread, shared.program);
      pass_over(launch, lane_of(launch, sample, first, thread), pass == 1, thread, shared);
    });
    if (pass == 1) return;
    each_thread([&](int thread) {
      if (thread < launch.groups && first + thread < launch.groups_of_sample) {
        weigh(launch, sample, position, first, thread, shared);
      }
      if (first != 0 || thread != 0) return;
      launch.weights[2 * sample] = 1.0f;
      launch.weights[2 * sample + 1] = constant_scale<float>(a, sample, position.index);
    });
  }
}

}  // namespace

cudaError_t launch_groups(const GroupsLaunch& launch, cudaStream_t stream) {
  void* parameters[] = {const_cast<GroupsLaunch*>(&launch)};
  const void* kernel = reinterpret_cast<const void*>(groups_kernel);
  const dim3 blocks(static_cast<unsigned>(launch.blocks));
  return cudaLaunchKernel(kernel, blocks, dim3(kGroupThreads), parameters, 0, stream);
}

}  // namespace cuda
}  // namespace fastguide
