// The CUDA kernel that guides samples whose groups of elements, such as tokens, have weights of their own: norms and
// inner products of each group's two predictions, its program, what the weights make of them, and the step (groups.h).
//
// Some lanes of a warp have a group, or a block has one. They add up vectors that begin with the group, in an order
// that depends on nothing but its size, and all is in double: what nearly cancels is divided by its norm (the CPU's
// kernel is in double there alone), and the guided prediction is a float again. One place of the code reads the
// predictions, in two passes, of which the second mostly finds them in the cache.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cursor.h"
#include "kernels/gpu/group_elements.h"
#include "kernels/gpu/group_step.h"
#include "kernels/gpu/groups.h"
#include "kernels/gpu/launch.h"
#include "kernels/gpu/moments.h"
#include "kernels/gpu/readers.h"
#include "kernels/gpu/vector.h"
#include "kernels/weights.h"
#include "maths/program.h"
#include "maths/step.h"

namespace fastguide {
namespace cuda {
namespace {

// The least number of blocks on a multiprocessor: as many as leave all in registers, of which a thread then has at most
// 80, or 96.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kGroupBlocks = 6;
#else
constexpr int kGroupBlocks = 5;
#endif

struct Shared {
  GroupRow row;
  bool last;                                  // what reads_last has returned to the first thread
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

// ---- Elements ----

// A vector of the predictions, and of the sample in a step; what is behind the group is 0.
struct Values {
  float first[kVector], second[kVector], sample[kVector];
};

__device__ void load_values(const GroupsLaunch& launch, const Lane& l, const Span& span, bool steps, Values& values) {
  const Input &first = launch.predictions[0], &second = launch.predictions[1], &sample = launch.a.sample;
  if (is_vector(l, span)) {
    Raw raw_sample{};
    const Raw raw_first = load_group(l, first, span), raw_second = load_group(l, second, span);
    if (steps) raw_sample = load_group(l, sample, span);
    unpack(raw_first, first.element, values.first);
    unpack(raw_second, second.element, values.second);
    unpack(raw_sample, sample.element, values.sample);
    return;
  }
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector; ++i) {
    turned(values.first, load_one(l, first, span, i));
    turned(values.second, load_one(l, second, span, i));
    if (steps) turned(values.sample, load_one(l, sample, span, i));
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

__device__ void guide(const GroupsLaunch& launch, const Lane& l, const Span& span, const PairWeights<double>& weights,
                      const Values& values, const GroupRow& row) {
  float x0[kVector] = {}, next[kVector];
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    next[i] = float(guided_prediction(weights, double(values.first[i]), double(values.second[i])));
  }
  if (launch.steps) step_values(l, span, row, values.sample, x0, next);
  write_values(launch, l, span, row, values.sample, x0, next);
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
    const Span span = {done, size - done < kVector ? size - done : kVector};
    Values values = {};
    load_values(launch, l, span, guides && launch.steps, values);
    if (guides) {
      guide(launch, l, span, weights, values, shared.row);
    } else {
      add_products(values, sums);
    }
  }
  if (!guides) put_sums(launch, thread, sums, shared);
}

// The position is that of the sample, which is not finished. first: the block's first group.
__device__ void run(const GroupsLaunch& launch, uint32_t sample, int64_t first, Position position, Shared& shared) {
  const StepArguments& a = launch.a;
  const bool inside = in_table(a, position);
  if (!inside) position.index = 0;  // the step makes such a sample NaN
  FASTGUIDE_ROLL
  for (int pass = 0; pass < 2; ++pass) {
    each_thread([&](int thread) {
      if (pass == 0) {
        copy_program(launch, sample, thread, shared.program);
        copy_row(a, position, thread, shared.row);
      }
      pass_over(launch, lane_of(launch, sample, first, thread), pass == 1, thread, shared);
    });
    if (pass == 1) return;
    each_thread([&](int thread) {
      if (thread < launch.groups && first + thread < launch.groups_of_sample) {
        weigh(launch, sample, position, first, thread, shared);
      }
      if (thread != kGroupThreads - 1) return;  // of another warp
      list_tensors(a, inside, shared.row);
      if (!launch.steps && first == 0) {
        launch.weights[2 * sample] = 1.0f;
        launch.weights[2 * sample + 1] = constant_scale<float>(a, sample, position.index);
      }
    });
  }
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
  const Position position = position_of(a, sample);
  if (launch.steps) {
    const bool last = reads_last<Noise::none>(a, position, 0);
    if (threadIdx.x == 0) shared.last = last;  // no register holds it till then
  }
  if (is_live(a, position)) run(launch, sample, first, position, shared);
  if (!launch.steps) return;
  __syncthreads();  // of a finished sample, no other barrier is behind the first thread's write
  advance_if<Noise::none>(threadIdx.x == 0 && shared.last, a);
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
