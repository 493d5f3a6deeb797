// The CUDA kernel that guides samples whose groups of elements, such as tokens, have weights of their own: moments of
// each group's two or three terms, its program, what the weights make of the predictions, and the step (groups.h).
//
// Some lanes of a warp have a group, or a block has one. They add up vectors that begin with the group, in an order
// that depends on nothing but its size, and all is in double: what nearly cancels is divided by its norm (the CPU's
// kernel is in double there alone), and the guided prediction is a float again. One place of the code reads the
// predictions, in two passes for the norms of two, of which the second mostly finds them in the cache. A third term and
// sums have a pass each in between: a thread then adds up three numbers at a time, whatever a program reads.
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

constexpr int kSumsOfPass = 3;

struct Shared {
  GroupRow row;
  Position position;                        // of the sample
  bool last;                                // what reads_last has returned to the first thread
  double values[kGroupValues];              // launch.values of each group, the moments first
  double sums[kSumsOfPass][kGroupThreads];  // of the lanes of a group or warp
  int32_t program[kMaxWords];
};

// Calls f(thread) for this thread; on a host, whose threads run one after the other and thread 0 last, for each of them
// then. Returns what f does; there, whether any does.
template <typename F>
__device__ bool each_thread(const F& f) {
#if defined(__CUDA_ARCH__)
  return f(int(threadIdx.x));
#else
  bool any = false;
  for (int thread = 0; thread < kGroupThreads; ++thread) any = f(thread) || any;
  return any;
#endif
}

// ---- Elements ----

// A vector of the predictions, and of launch.third; what is behind the group is 0.
struct Values {
  float first[kVector], second[kVector], third[kVector];
};

__device__ void load_values(const GroupsLaunch& launch, const Lane& l, const Span& span, bool with_third,
                            Values& values) {
  const Input &first = launch.predictions[0], &second = launch.predictions[1], &third = launch.third;
  if (is_vector(l, span)) {
    Raw raw_third{};
    const Raw raw_first = load_group(l, first, span), raw_second = load_group(l, second, span);
    if (with_third) raw_third = load_group(l, third, span);
    unpack(raw_first, first.element, values.first);
    unpack(raw_second, second.element, values.second);
    unpack(raw_third, third.element, values.third);
    return;
  }
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector; ++i) {
    turned(values.first, load_one(l, first, span, i));
    turned(values.second, load_one(l, second, span, i));
    if (with_third) turned(values.third, load_one(l, third, span, i));
  }
}

// The third term of an element: a difference to the first prediction, or the sample.
__device__ double third_of(const StepArguments& a, const Values& values, int i) {
  return double(values.third[i]) - (a.weighs_sample ? 0.0 : double(values.first[i]));
}

// ---- Moments ----

// Adds what a pass adds up: products of the first two terms; or the third one's with all, or the sums of all.
__device__ void add_products(const StepArguments& a, Pass pass, const Values& values, double (&sums)[kSumsOfPass]) {
  if (pass == Pass::pairs) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const double base = double(values.first[i]), difference = double(values.second[i]) - base;
      sums[0] = fused(base, base, sums[0]);
      sums[1] = fused(base, difference, sums[1]);
      sums[2] = fused(difference, difference, sums[2]);
    }
    return;
  }
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const double base = double(values.first[i]), third = third_of(a, values, i);
    const double factor = pass == Pass::third ? third : 1.0;
    sums[0] = fused(factor, base, sums[0]);
    sums[1] = fused(factor, double(values.second[i]) - base, sums[1]);
    sums[2] = fused(factor, third, sums[2]);
  }
}

// Leaves the sums of a group's lanes, or of a warp's, by halves.
__device__ void put_sums(const GroupsLaunch& launch, int thread, double (&sums)[kSumsOfPass], Shared& shared) {
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
  for (int n = 0; n < kSumsOfPass && !is_first; ++n) sums[n] += shared.sums[n][part];
#endif
  FASTGUIDE_UNROLL
  for (int n = 0; n < kSumsOfPass && writes; ++n) shared.sums[n][part] = sums[n];
}

// Where the n-th sum of a pass is among the moments of so many terms. Of two terms there is no third sum: its place is
// that of an input which comes later.
__device__ int place_of(Pass pass, int terms, int n) {
  if (pass == Pass::pairs) return n < 2 ? n : terms;
  if (pass == Pass::third) return n < 1 ? 2 : n + 3;
  return moments_of(terms) - terms + n;
}

// Puts the sums of a pass among a group's values.
__device__ void take_sums(const GroupsLaunch& launch, Pass pass, int group, Shared& shared) {
  const int parts = launch.lane_bits > 5 ? 1 << (launch.lane_bits - 5) : 1;
  FASTGUIDE_ROLL
  for (int n = 0; n < kSumsOfPass; ++n) {
    double sum = shared.sums[n][group * parts];
    FASTGUIDE_ROLL
    for (int k = 1; k < parts; ++k) sum += shared.sums[n][group * parts + k];
    shared.values[group * launch.values + place_of(pass, launch.terms, n)] = sum;
  }
}

// ---- Weights ----

// The position, or the table's first row, where it has none: the step makes such a sample NaN.
__device__ Position within_table(const StepArguments& a, Position position) {
  if (!in_table(a, position)) position.index = 0;
  return position;
}

// Copies a sample's program, so that no word of it leads out of the values: nobody has checked a program on a device.
// Returns whether a word of this thread's leads to a sum.
__device__ bool copy_program(const GroupsLaunch& launch, int64_t sample, int thread, int32_t* program) {
  const StepArguments& a = launch.a;
  const int32_t* from = program_of(a, sample);
  const int terms = launch.terms, all = moments_of(terms);
  const int most = launch.values - (all + kOtherInputs + a.num_parameters);
  const int instructions = from[0] < 0 ? 0 : from[0] < most ? from[0] : most;
  const int words = int(words_of(terms, instructions));
  bool reads_sums = false;
  FASTGUIDE_ROLL
  for (int k = thread; k < words; k += kGroupThreads) {
    const uint32_t word = k < a.program_words ? uint32_t(from[k]) : 0u;
    const bool is_operation = k > terms && (k - terms - 1) % kInstructionWords == 0;
    const uint32_t limit = is_operation ? uint32_t(Operation::count) : uint32_t(launch.values);
    program[k] = k == 0 ? instructions : int32_t(word < limit ? word : 0u);
    reads_sums = reads_sums || (k > 0 && !is_operation && word - uint32_t(all - terms) < uint32_t(terms));
  }
  return reads_sums;
}

// Makes a group's weights, once its moments are there.
__device__ void weigh(const GroupsLaunch& launch, int64_t sample, int64_t first, int group, Shared& shared) {
  const StepArguments& a = launch.a;
  float* made = static_cast<float*>(a.made) + (sample * launch.groups_of_sample + first + group) * made_columns(a);
  make_weights<float>(a, shared.program, sample, within_table(a, shared.position),
                      shared.values + group * launch.values, made);
}

// ---- The guided prediction ----

struct GroupWeights {
  PairWeights<double> pair;
  double third;
};

__device__ void guide(const GroupsLaunch& launch, const Lane& l, const Span& span, const GroupWeights& weights,
                      Values& values, const GroupRow& row) {
  float x0[kVector] = {}, next[kVector];
  const auto of_pair = [&](int i) {
    return guided_prediction(weights.pair, double(values.first[i]), double(values.second[i]));
  };
  if (launch.terms == 2) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) next[i] = float(of_pair(i));
  } else {
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      next[i] = float(fused(weights.third, third_of(launch.a, values, i), of_pair(i)));
    }
    if (launch.steps && !launch.a.weighs_sample) load_values(l, launch.a.sample, span, values.third);
  }
  if (launch.steps) step_values(l, span, row, values.third, x0, next);
  write_values(launch, l, span, row, values.third, x0, next);
}

// ---- The kernel ----

// Adds up what a pass adds of a thread's elements, or guides them.
__device__ void pass_over(const GroupsLaunch& launch, const Lane& l, Pass pass, int thread, Shared& shared) {
  double sums[kSumsOfPass] = {};
  const int size = int(launch.a.elements_per_sample), step = kVector << launch.lane_bits;
  const bool guides = pass == Pass::guides, with_third = launch.third_in >> int(pass) & 1;
  const double* of_group = shared.values + l.group * launch.values;
  GroupWeights weights{};
  if (guides && l.active) {
    weights.pair = {of_group[shared.program[1]], of_group[shared.program[2]]};
    if (launch.terms > 2) weights.third = of_group[shared.program[3]];
  }
  FASTGUIDE_ROLL
  for (int done = l.lane * kVector; l.active && done < size; done += step) {
    const Span span = {done, size - done < kVector ? size - done : kVector};
    Values values = {};
    load_values(launch, l, span, with_third, values);
    if (guides) {
      guide(launch, l, span, weights, values, shared.row);
    } else {
      add_products(launch.a, pass, values, sums);
    }
  }
  if (!guides) put_sums(launch, thread, sums, shared);
}

// What one thread leaves for all: the row's tensors, and the weights of a step that is left to another launch.
__device__ void prepare_step(const GroupsLaunch& launch, uint32_t sample, int64_t first, Shared& shared) {
  const StepArguments& a = launch.a;
  list_tensors(a, in_table(a, shared.position), shared.row);
  if (launch.steps || first != 0) return;
  launch.weights[2 * sample] = 1.0f;
  launch.weights[2 * sample + 1] = constant_scale<float>(a, sample, within_table(a, shared.position).index);
}

// reads_sums: what was found before the first pass, and behind it false.
__device__ Pass next_of(Pass pass, int terms, bool reads_sums) {
  if (reads_sums) return Pass::sums;
  return pass != Pass::third && terms > 2 ? Pass::third : Pass::guides;
}

// The position is that of the sample, which is not finished. first: the block's first group.
__device__ void run(const GroupsLaunch& launch, uint32_t sample, int64_t first, const Position& position,
                    Shared& shared) {
  bool reads_sums = each_thread([&](int thread) {
    copy_row(launch.a, within_table(launch.a, position), thread, shared.row);
    return copy_program(launch, sample, thread, shared.program);
  });
  Pass pass = Pass::pairs;
  FASTGUIDE_ROLL
  while (true) {
    each_thread([&](int thread) {
      pass_over(launch, lane_of(launch, sample, first, thread), pass, thread, shared);
      return false;
    });
    if (pass == Pass::guides) return;
    const Pass next = next_of(pass, launch.terms, __syncthreads_or(reads_sums));
    reads_sums = false;
    each_thread([&](int thread) {
      const bool has_group = thread < launch.groups && first + thread < launch.groups_of_sample;
      if (has_group) take_sums(launch, pass, thread, shared);
      if (next != Pass::guides) return false;
      if (has_group) weigh(launch, sample, first, thread, shared);
      if (thread == kGroupThreads - 1) prepare_step(launch, sample, first, shared);  // of another warp
      return false;
    });
    __syncthreads();
    pass = next;
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
  const bool last = launch.steps && reads_last<Noise::none>(a, position, 0);
  if (threadIdx.x == 0) {  // no register holds them till then
    shared.position = position;
    shared.last = last;
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
