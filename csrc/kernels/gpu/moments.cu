// The CUDA kernel that makes the weights of a step: moments of every part of every sample, and then the program; and,
// where the blocks of a sample can wait for each other, the step as well (joined.h).
//
// A block adds up one part of one sample, see kernels/weights.h. Where the step has a launch of its own, the last block
// of a sample adds its parts, in order, and runs the program in one thread; in a joined launch, every block of the
// sample does, and steps its part. So bits depend on the sample alone, and on no launch.
#include <cuda_runtime.h>

#include <atomic>

#include "kernels/cursor.h"
#include "kernels/gpu/add_part.h"
#include "kernels/gpu/count.h"
#include "kernels/gpu/joined.h"
#include "kernels/gpu/launch.h"
#include "kernels/gpu/moments.h"
#include "kernels/gpu/readers.h"
#include "kernels/gpu/thread.h"
#include "kernels/weights.h"

namespace fastguide {
namespace cuda {
namespace {

constexpr int kMomentBlocks = 4;  // the least number on a multiprocessor: what is added up stays in 64 registers

// Half a vector at a time, which leaves registers to what is added up; what else there is, is looked up at run time.
struct Joined : Variant<0, Extras::history, Noise::given, true, true> {
  static constexpr bool looks_for_noise = true;
  static constexpr int width = kHalfVector;
};

// What a block knows of its sample once the weights are made.
struct Made {
  float returned[kMaxTerms + 1], weights[kMaxTerms + 1];  // the latter in the order of the step
  // Of a joined launch: the members of SampleRow, and, for the first thread, what reads_last has returned.
  Row<float> c;
  uint32_t step;
  bool last;
};

// ---- Waiting for the other blocks of a sample ----

// Whether this is the last block of its sample: then what the others have written is there for it.
__device__ bool is_last_of_sample(const MomentsLaunch& launch, int64_t sample) {
  __syncthreads();  // what all threads have written comes before the count
  bool last = false;
  if (threadIdx.x == 0) {
    unsigned* blocks = reinterpret_cast<unsigned*>(counters_of(launch.a) + sample);
    last = count_released(blocks) == launch.blocks - 1;
    if (last) {
      *blocks = 0;  // for the next launch
      __threadfence();
    }
  }
  return __syncthreads_or(last);
}

// Waits for all blocks of a cluster, and for what they have written.
__device__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif  // nothing launches clusters of other code
}

// Whether this block goes on, for which the moments of all parts are there. On a host, whose threads run one after the
// other and thread 0 last, that one goes on for all.
__device__ bool has_all_parts(const MomentsLaunch& launch, int64_t sample) {
  if (launch.blocks > 1 && !launch.joined) return is_last_of_sample(launch, sample);
  if (launch.blocks > 1) wait_for_cluster();
  return __syncthreads_or(threadIdx.x == 0);
}

// ---- The weights, and the step ----

// Leaves them in the block's memory, for all threads behind a barrier.
__device__ void make(const MomentsLaunch& launch, int64_t sample, const Position& position, Adding& block, Made& made) {
  const StepArguments& a = launch.a;
  if (launch.blocks > 1) add_parts(a, sample, block);
  copy_program(a, sample, block);
  __syncthreads();
  if (threadIdx.x == 0) {
    make_weights_of(a, sample, position, block, made.returned);
    reorder_weights(a, made.returned, made.weights);
    if (launch.joined) {
      const SampleRow row = row_of<Joined>(launch.step, sample, position, made.weights);
      made.c = row.c;
      made.step = row.step;
    }
  }
  __syncthreads();
}

__device__ void write_weights(const StepArguments& a, int64_t sample, const Made& made) {
  const int columns = made_columns(a);
  float* returned = static_cast<float*>(a.made) + sample * columns;
  float* weights = step_weights_of(a) + sample * columns;
  for (int k = threadIdx.x; k < columns; k += blockDim.x) {
    returned[k] = made.returned[k];
    weights[k] = made.weights[k];
  }
}

// Places are small: a cluster has few parts.
__device__ void step_part(const Launch& launch, uint32_t sample, uint32_t part, const Made& made) {
  const StepArguments& a = launch.a;
  const uint32_t begin = part * uint32_t(kPart), size = uint32_t(a.elements_per_sample);
  const uint32_t end = begin + uint32_t(kPart) < size ? begin + uint32_t(kPart) : size;
  FASTGUIDE_ROLL
  for (uint32_t place = begin + threadIdx.x * kHalfVector; place < end; place += blockDim.x * kHalfVector) {
    float z[kHalfVector] = {};
    if (a.noise_kind == Noise::portable) {
      draw_calls(uint64_t(a.seeds[sample * a.seeds_stride]), made.step, place, z);
    }
    const RawInputs raw = load_inputs<Joined>(launch, sample, place);
    step_vector<Joined>(launch, made, raw, z, sample, place);
  }
}

// ---- The kernel ----

// The position is that of the sample, which is not finished. In a cluster, blocks behind the last part have nothing to
// add or to step.
__device__ void run(const MomentsLaunch& launch, uint32_t sample, uint32_t part, const Position& position,
                    Adding& block, Made& made) {
  if (part < parts_of(launch.a)) {
    add_part(launch, sample, part, block);
    if (launch.blocks > 1) write_part(launch.a, sample, part, block);
  }
  if (!has_all_parts(launch, sample)) return;
  make(launch, sample, position, block, made);
  if (part == 0 || !launch.joined) write_weights(launch.a, sample, made);
  if (launch.joined) step_part(launch.step, sample, part, made);
}

__global__ void __launch_bounds__(kMomentThreads, kMomentBlocks)
    moments_kernel(const __grid_constant__ MomentsLaunch launch) {
  __shared__ Adding block;
  __shared__ Made made;
  const StepArguments& a = launch.a;
  const uint32_t sample = blockIdx.x / launch.blocks, part = blockIdx.x - sample * launch.blocks;
  const Position position = position_of(a, sample);
  if (launch.joined) {
    const bool last = reads_last<Noise::none>(a, position, 0);
    if (threadIdx.x == 0) made.last = last;  // no register holds it till then
  }
  if (is_live(a, position)) run(launch, sample, part, position, block, made);
  if (!launch.joined) return;
  __syncthreads();
  advance_if<Noise::none>(threadIdx.x == 0 && made.last, a);
}

cudaLaunchConfig_t configuration(int64_t blocks, cudaLaunchAttribute* cluster, unsigned blocks_of_cluster,
                                 cudaStream_t stream) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {blocks_of_cluster, 1, 1};
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(blocks));
  how.blockDim = dim3(kMomentThreads);
  how.stream = stream;
  how.attrs = cluster;
  how.numAttrs = blocks_of_cluster > 1 ? 1 : 0;
  return how;
}

// Asks the current device whether it runs the most blocks of a sample as a cluster; if not, one block of a sample.
int ask_most_blocks() {
  const void* kernel = reinterpret_cast<const void*>(moments_kernel);
  cudaFuncAttributes code{};
  if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess || code.ptxVersion < 90) return 1;
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t how = configuration(kMostBlocks, &cluster, kMostBlocks, nullptr);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &how) != cudaSuccess) return 1;
  return clusters > 0 ? kMostBlocks : 1;
}

}  // namespace

int most_blocks_of_sample(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  if (device < 0 || device >= kDevices) return 1;
  int blocks = known[device].load(std::memory_order_relaxed);
  if (blocks == 0) known[device].store(blocks = ask_most_blocks(), std::memory_order_relaxed);
  return blocks;
}

cudaError_t launch_moments(const MomentsLaunch& launch, cudaStream_t stream) {
  void* parameters[] = {const_cast<MomentsLaunch*>(&launch)};
  cudaLaunchAttribute cluster{};
  const int64_t blocks = launch.a.batch * launch.blocks;
  const cudaLaunchConfig_t how = configuration(blocks, &cluster, launch.joined ? launch.blocks : 1, stream);
  return cudaLaunchKernelExC(&how, reinterpret_cast<const void*>(moments_kernel), parameters);
}

}  // namespace cuda
}  // namespace fastguide
