// What makes a sample's weights: a block adds up one part of the sample, and a thread runs the program. Device only,
// behind CUDA's own header.
//
// The number of terms is known at run time, so that all that is not the adding is there once a kernel.
#pragma once

#include <cstdint>

#include "kernels/gpu/moments.h"
#include "kernels/gpu/vector.h"
#include "kernels/weights.h"
#include "maths/program.h"
#include "maths/step.h"

namespace fastguide {
namespace cuda {

constexpr int kVectorsOfThread = kPart / (kMomentThreads * kVector);
static_assert(kVectorsOfThread * kMomentThreads * kVector == kPart, "the threads of a block share a part out");

// The block's memory for it.
struct Adding {
  double warps[kMomentWarps][kMostMoments];
  double values[kMaxValues];  // of the program, of which the first are the moments
  int32_t program[kMaxWords];
};

// One element of all terms.
template <int terms>
static __device__ void add_element(float (&t)[terms], bool weighs_sample, float (&sums)[moments_of(terms)]) {
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

// Of four terms, half a vector at a time, so that all stays in registers: an element's turn is the same.
template <int terms>
static __device__ void add_elements(const MomentsLaunch& launch, int64_t sample, int64_t place, int64_t end,
                                    float (&sums)[moments_of(terms)]) {
  constexpr int width = terms < kMaxTerms ? kVector : kHalfVector;
  const bool weighs_sample = launch.a.weighs_sample;
  if (launch.aligned && place + kVector <= end) {
    FASTGUIDE_ROLL
    for (int64_t behind = place + kVector; place < behind; place += width) {
      float values[terms][width];
      FASTGUIDE_UNROLL
      for (int k = 0; k < terms; ++k) {
        unpack(load_raw<width>(launch.terms[k], sample, place), launch.terms[k].element, values[k]);
      }
      FASTGUIDE_UNROLL
      for (int i = 0; i < width; ++i) {
        float t[terms];
        FASTGUIDE_UNROLL
        for (int k = 0; k < terms; ++k) t[k] = values[k][i];
        add_element<terms>(t, weighs_sample, sums);
      }
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

// Leaves the block's sums in its values: of a warp's lanes by halves, and of the warps in order. A sum is there for the
// thread of its number. On a host, whose threads run one after the other and thread 0 last, that thread has them all.
template <int count>
static __device__ void add_threads(const float (&sums)[count], Adding& block) {
#if defined(__CUDA_ARCH__)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double values[count];
  FASTGUIDE_UNROLL
  for (int n = 0; n < count; ++n) values[n] = double(sums[n]);
  FASTGUIDE_ROLL
  for (int half = 16; half > 0; half /= 2) {
    FASTGUIDE_UNROLL
    for (int n = 0; n < count; ++n) values[n] += __shfl_down_sync(0xFFFFFFFFu, values[n], half);
  }
  FASTGUIDE_UNROLL
  for (int n = 0; n < count; ++n) {
    if (lane == 0) block.warps[warp][n] = values[n];
  }
#else
  for (int n = 0; n < count; ++n) block.warps[0][n] += double(sums[n]);
#endif
}

template <int terms>
static __device__ void add_part_of(const MomentsLaunch& launch, int64_t sample, int64_t part, Adding& block) {
  float sums[moments_of(terms)] = {};
  const int64_t begin = part * kPart, size = launch.a.elements_per_sample;
  const int64_t end = begin + kPart < size ? begin + kPart : size;
  FASTGUIDE_ROLL
  for (int k = 0; k < kVectorsOfThread; ++k) {
    const int64_t place = begin + (int64_t(k) * kMomentThreads + threadIdx.x) * kVector;
    if (place < end) add_elements<terms>(launch, sample, place, end, sums);
  }
  add_threads(sums, block);
}

// Leaves the moments of one part of a sample in the block's values, each for the thread of its number.
static __device__ void add_part(const MomentsLaunch& launch, int64_t sample, int64_t part, Adding& block) {
  const int terms = terms_of(launch.a), count = moments_of(terms);
  switch (terms) {
    case 2:
      add_part_of<2>(launch, sample, part, block);
      break;
    case 3:
      add_part_of<3>(launch, sample, part, block);
      break;
    default:
      static_assert(kMaxTerms == 4, "these are all");
      add_part_of<4>(launch, sample, part, block);
  }
  __syncthreads();
#if defined(__CUDA_ARCH__)
  const int n = threadIdx.x;
  if (n >= count) return;
  double total = block.warps[0][n];
  FASTGUIDE_UNROLL
  for (int k = 1; k < kMomentWarps; ++k) total += block.warps[k][n];
  block.values[n] = total;
#else
  for (int n = 0; threadIdx.x == 0 && n < count; ++n) {
    block.values[n] = block.warps[0][n];
    block.warps[0][n] = 0.0;  // for the next block
  }
#endif
}

// Gives a part's moments to the other blocks of the sample.
static __device__ void write_part(const StepArguments& a, int64_t sample, int64_t part, const Adding& block) {
  const int count = moments_of(terms_of(a));
  double* written = sums_of(a) + (sample * parts_of(a) + part) * count;
  for (int n = threadIdx.x; n < count; n += blockDim.x) written[n] = block.values[n];
}

// Adds the moments of all parts, in order, once they are there.
static __device__ void add_parts(const StepArguments& a, int64_t sample, Adding& block) {
  const int64_t parts = parts_of(a);
  const int count = moments_of(terms_of(a));
  const double* read = sums_of(a) + sample * parts * count;
  for (int n = threadIdx.x; n < count; n += blockDim.x) {
    double total = read[n];
    for (int64_t k = 1; k < parts; ++k) total += read[k * count + n];
    block.values[n] = total;
  }
}

// Copies a sample's program, so that no word of it leads out of the values: nobody has checked a program on a device.
static __device__ void copy_program(const StepArguments& a, int64_t sample, Adding& block) {
  const int32_t* from = program_of(a, sample);
  const int terms = terms_of(a), most = kMaxValues - (moments_of(terms) + kOtherInputs + a.num_parameters);
  const int instructions = from[0] < 0 ? 0 : from[0] < most ? from[0] : most;
  const int words = int(words_of(terms, instructions));
  FASTGUIDE_ROLL
  for (int k = threadIdx.x; k < words; k += blockDim.x) {
    const int32_t word = k < a.program_words ? from[k] : 0;
    const bool is_operation = k > terms && (k - terms - 1) % kInstructionWords == 0;
    const unsigned operations = unsigned(Operation::count);
    block.program[k] = k == 0         ? instructions
                       : is_operation ? int32_t(unsigned(word) < operations ? unsigned(word) : 0u)
                                      : int32_t(unsigned(word) % unsigned(kMaxValues));
  }
}

// Runs the program of a sample in one thread, once its moments and its words are in the block's memory.
static __device__ void make_weights_of(const StepArguments& a, int64_t sample, Position position, Adding& block,
                                       float* made) {
  if (!in_table(a, position)) position.index = 0;  // the step makes such a sample NaN
  make_weights<float>(a, block.program, sample, position, block.values, made);
}

// Writes a sample's weights in the order in which the step reads them. The sample's own is that of one more prediction.
static __device__ void reorder_weights(const StepArguments& a, const float* made, float* read) {
  const int count = a.num_predictions;
  FASTGUIDE_ROLL
  for (int k = 0; k <= count; ++k) read[k] = made[k];
  if (!a.weighs_sample) return;
  const float of_sample = made[count + 1];
  read[0] = made[0] + of_sample;
  read[count] = of_sample;
  read[count + 1] = made[count];
}

}  // namespace cuda
}  // namespace fastguide
