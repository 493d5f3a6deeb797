// The CUDA kernel that finds the thresholds of a step: the quantile of each sample's |x0|, without a sort.
//
// A magnitude's bits, as an integer, are in the order of the magnitudes. Three launches find the one of a given rank,
// 11, 10 and 10 bits at a time: each counts one digit of those that begin with what is known so far. A block counts one
// part of one sample; the last block of a sample finds the digit in which the rank lies. Counts are integers, so that
// no order of blocks changes a bit.
#include <cuda_runtime.h>

#include "kernels/cursor.h"
#include "kernels/gpu/count.h"
#include "kernels/gpu/launch.h"
#include "kernels/gpu/make_launch.h"
#include "kernels/gpu/thread.h"
#include "kernels/gpu/thresholds.h"
#include "kernels/gpu/vector.h"
#include "kernels/thresholds.h"
#include "kernels/weights.h"

namespace fastguide {
namespace cuda {
namespace {

constexpr int kBinsOfGroup = 32, kGroups = kThresholdBins / kBinsOfGroup;

// Of a key, so many bits are known before a launch, and its digit is what follows them.
__device__ int digit_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
__device__ unsigned digit_mask(int pass) { return pass == 0 ? 2047u : 1023u; }
__device__ unsigned known_of(unsigned key, int pass) { return pass == 0 ? 0u : key >> (pass == 1 ? 20 : 10); }

// What a thread has seen beside the digits that it counts.
struct Beyond {
  unsigned largest;   // of all keys
  unsigned not_next;  // the complement of the smallest key that begins with more than what is known
};

using OfAny = Variant<0, Extras::any, Noise::none, false, false>;

__device__ void count_key(float x0, int pass, unsigned known, unsigned* bins, Beyond* beyond) {
  const unsigned key = unsigned(key_of(x0)), here = known_of(key, pass);
  if (here == known) atomicAdd(&bins[key >> digit_shift(pass) & digit_mask(pass)], 1u);
  if (here > known && ~key > beyond->not_next) beyond->not_next = ~key;
  if (key > beyond->largest) beyond->largest = key;
}

__device__ void count_keys(const ThresholdsLaunch& launch, const SampleRow& r, int64_t sample, int64_t place,
                           int64_t end, unsigned known, unsigned* bins, Beyond* beyond) {
  const Launch& step = launch.step;
  if (step.aligned && place + kVector <= end) {
    const RawInputs raw = load_inputs<OfAny>(step, sample, place);
    float x[kVector], m[kVector], g[kVector] = {};
    unpack(raw.sample, step.a.sample.element, x);
    combine_vector<OfAny>(step, r, raw, sample, place, m);
    if (step.a.gradient.data != nullptr) unpack(raw.gradient, step.a.gradient.element, g);
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      count_key(original_of<OfAny>(step.a, r.c, x[i], m[i], g[i]), launch.pass, known, bins, beyond);
    }
    return;
  }
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector && place + i < end; ++i) {
    const SingleInputs bits = load_single<OfAny>(step, sample, place + i);
    const float x = value_of(bits.sample, step.a.sample.element);
    const float m = combine_single<OfAny>(step, r, bits, sample, place + i);
    const float g = step.a.gradient.data != nullptr ? value_of(bits.gradient, step.a.gradient.element) : 0.0f;
    count_key(original_of<OfAny>(step.a, r.c, x, m, g), launch.pass, known, bins, beyond);
  }
}

// Whether this is the last block of its sample: then what the others have counted is there for it.
__device__ bool is_last_of_sample(const ThresholdsLaunch& launch, unsigned* words) {
  __syncthreads();  // what all threads have counted comes before the block is
  bool last = false;
  if (threadIdx.x == 0) {
    last = count_released(&words[kThresholdBlocks]) == unsigned(parts_of(launch.step.a)) - 1;
    if (last) {
      words[kThresholdBlocks] = 0;  // for the next launch
      __threadfence();
    }
  }
  return __syncthreads_or(last);
}

// Takes the sums out of the sample's memory, which is 0 then, into the block's; and their sums by groups.
__device__ void take_bins(unsigned* words, unsigned* bins, unsigned* groups) {
  for (int k = threadIdx.x; k < kThresholdBins; k += blockDim.x)
    bins[k] = atomicExch(&words[kThresholdFirstBin + k], 0u);
  __syncthreads();
  for (int group = threadIdx.x; group < kGroups; group += blockDim.x) {
    unsigned sum = 0;
    FASTGUIDE_ROLL
    for (int k = 0; k < kBinsOfGroup; ++k) sum += bins[group * kBinsOfGroup + k];
    groups[group] = sum;
  }
  __syncthreads();
}

// Returns the bin that holds a rank, which is counted from that bin on then.
__device__ unsigned bin_of(const unsigned* bins, const unsigned* groups, unsigned* rank) {
  int group = 0;
  FASTGUIDE_ROLL
  while (group < kGroups - 1 && *rank >= groups[group]) *rank -= groups[group++];
  int bin = group * kBinsOfGroup;
  FASTGUIDE_ROLL
  while (bin < kThresholdBins - 1 && *rank >= bins[bin]) *rank -= bins[bin++];
  return unsigned(bin);
}

// Of the keys behind a bin: those of the later bins, or what begins with more than is known.
__device__ unsigned key_behind(const unsigned* bins, unsigned bin, unsigned known, unsigned not_next) {
  FASTGUIDE_ROLL
  for (unsigned k = bin + 1; k <= digit_mask(2); ++k) {
    if (bins[k] != 0) return known << 10 | k;
  }
  return ~not_next;
}

// Writes 1 over the threshold, and leaves the memory of the search as it was.
__device__ void finish(const Row<float>& row, int64_t count, unsigned known, unsigned bin, unsigned left,
                       const unsigned* bins, unsigned* words) {
  const Rank<float> rank = rank_of(row.quantile, count);
  const unsigned key = known << 10 | bin;
  unsigned next = key;
  if (rank.upper > rank.lower && left + 1 >= bins[bin]) next = key_behind(bins, bin, known, words[kThresholdNotNext]);
  float threshold =
      threshold_between(magnitude_of<float>(int32_t(key)), magnitude_of<float>(int32_t(next)), rank.weight, row.clip);
  if (words[kThresholdLargest] > 0x7F800000u) threshold = NAN;
  words[kThresholdKnown] = words[kThresholdRank] = words[kThresholdNotNext] = words[kThresholdLargest] = 0;
  *reinterpret_cast<float*>(words) = 1.0f / threshold;
}

__global__ void __launch_bounds__(kThresholdThreads)
    thresholds_kernel(const __grid_constant__ ThresholdsLaunch launch) {
  __shared__ unsigned bins[kThresholdBins], groups[kGroups];
  const StepArguments& a = launch.step.a;
  const int64_t parts = parts_of(a), sample = blockIdx.x / parts, part = blockIdx.x - sample * parts;
  const Position position = position_of(a, sample);
  if (!is_live(a, position) || !in_table(a, position)) return;
  const SampleRow r = row_of<OfAny>(launch.step, sample, position);
  if (!(r.c.quantile > 0.0f)) return;
  unsigned* const words = reinterpret_cast<unsigned*>(launch.thresholds) + sample * kThresholdWords;
  const unsigned known = words[kThresholdKnown];
#if defined(__CUDA_ARCH__)  // on a host, whose threads run one after the other, they are 0 already
  for (int k = threadIdx.x; k < kThresholdBins; k += blockDim.x) bins[k] = 0;
  __syncthreads();
#endif
  Beyond beyond{};
  const int64_t begin = part * kPart, size = a.elements_per_sample, end = begin + kPart < size ? begin + kPart : size;
  FASTGUIDE_ROLL
  for (int64_t place = begin + threadIdx.x * kVector; place < end; place += kThresholdThreads * kVector) {
    count_keys(launch, r, sample, place, end, known, bins, &beyond);
  }
  if (launch.pass == 0 && beyond.largest > 0x7F800000u) atomicMax(&words[kThresholdLargest], beyond.largest);
  if (launch.pass == 2 && beyond.not_next != 0) atomicMax(&words[kThresholdNotNext], beyond.not_next);
  __syncthreads();
  for (int k = threadIdx.x; k < kThresholdBins; k += blockDim.x) {
    const unsigned counted = bins[k];
    if (counted != 0) atomicAdd(&words[kThresholdFirstBin + k], counted);
    bins[k] = 0;
  }
  if (!is_last_of_sample(launch, words)) return;
  take_bins(words, bins, groups);
  if (threadIdx.x == 0) {
    unsigned rank = launch.pass == 0 ? unsigned(rank_of(r.c.quantile, size).lower) : words[kThresholdRank];
    const unsigned bin = bin_of(bins, groups, &rank);
    if (launch.pass < 2) {
      words[kThresholdKnown] = launch.pass == 0 ? bin : known << 10 | bin;
      words[kThresholdRank] = rank;
    } else {
      finish(r.c, size, known, bin, rank, bins, words);
    }
  }
#if !defined(__CUDA_ARCH__)
  for (unsigned& bin : bins) bin = 0;  // for the next block
#endif
}

}  // namespace

cudaError_t launch_thresholds(const StepArguments& a, cudaStream_t stream) {
  ThresholdsLaunch launch = make_thresholds_launch(a);
  void* parameters[] = {&launch};
  const dim3 blocks(static_cast<unsigned>(a.batch * parts_of(a)));
  const void* kernel = reinterpret_cast<const void*>(thresholds_kernel);
  for (launch.pass = 0; launch.pass < 3; ++launch.pass) {
    const cudaError_t error = cudaLaunchKernel(kernel, blocks, dim3(kThresholdThreads), parameters, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace fastguide
