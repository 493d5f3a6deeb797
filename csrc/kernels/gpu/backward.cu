// The CUDA kernel of a step's backward pass: the formulas of kernels/cpu/backward.h, in its order of operations.
//
// A block has a tile of one sample: a vector a thread where all tensors begin at 16 bytes, otherwise single elements.
// One kernel serves every step: which tensors there are, of which dtypes, is looked up at run time. What a tile adds to
// the gradients of weights, its threads add in an order that depends on no launch.
#include "kernels/gpu/backward.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cursor.h"
#include "kernels/gpu/vector.h"
#include "maths/step.h"

namespace fastguide {
namespace cuda {
namespace {

constexpr int kBackwardBlocks = 4;  // the least number on a multiprocessor: at most 128 registers a thread

// ---- A vector, or one element ----

template <int n>
using Bits = std::conditional_t<n == 1, uint32_t, Raw>;

template <int n>
__device__ Bits<n> load(const Input& input, int64_t sample, int64_t place) {
  if constexpr (n == 1) {
    return load_bits(input, sample, place);
  } else {
    return load_raw(input, sample, place);
  }
}

template <int n>
__device__ void values_of(const Bits<n>& bits, Element element, float (&values)[n]) {
  if constexpr (n == 1) {
    values[0] = value_of(bits, element);
  } else {
    unpack(bits, element, values);
  }
}

template <int n>
__device__ void store(const float (&values)[n], const Output& output, int64_t sample, int64_t place) {
  if constexpr (n == 1) {
    store_one(values[0], output, sample, place);
  } else {
    store_vector(values, output, sample, place);
  }
}

// Loads what is there; the values of what is absent stay as they are.
template <int n>
__device__ void load_values(const Input& input, int64_t sample, int64_t place, float (&values)[n]) {
  if (input.data != nullptr) values_of<n>(load<n>(input, sample, place), input.element, values);
}

// Calls f(i) for each element.
template <int n, typename F>
__device__ void each(const F& f) {
  FASTGUIDE_UNROLL
  for (int i = 0; i < n; ++i) f(i);
}

// ---- Rows ----

struct BackwardRow {
  const Row<float>* row;  // without the gradient's scale
  const float* weights;
  float scale;
  bool in_table;  // checked here because the host does not read device indices
  bool clips;
};

__device__ BackwardRow backward_row(const StepArguments& a, int64_t sample) {
  const Position position = position_of(a, sample);
  BackwardRow r;
  r.in_table = in_table(a, position);
  const int64_t index = r.in_table ? position.index : 0;
  r.row = &row_at<float>(a, index);
  r.weights = static_cast<const float*>(a.weights) + index * a.weights_step_stride + sample * a.weights_batch_stride;
  r.scale = gradient_scale(r.weights, a.num_predictions);
  r.clips = r.row->clip < INFINITY;
  return r;
}

// c*x; and c*x + d*y. What has a coefficient of 0 is not looked at: it may be anything.
__device__ float product(float c, float x) { return c != 0.0f ? c * x : 0.0f; }

__device__ float sum_of_two(float c, float x, float d, float y) {
  return fused(c, c != 0.0f ? x : 0.0f, product(d, y));
}

// ---- The elements of a thread ----

template <int n>
struct Elements {
  float in[n], left[n], q[n], dm[n], dg[n], g[n], sigma[n];  // by the names of kernels/cpu/backward.h
  Bits<n> first, second;                                     // predictions
};

template <int n>
__device__ void guided(const BackwardLaunch& launch, const BackwardRow& r, const Elements<n>& e, int64_t sample,
                       int64_t place, float (&m)[n]) {
  const int count = launch.a.num_predictions;
  float p0[n] = {}, p[n];
  if (count > 0) values_of<n>(e.first, launch.predictions[0].element, p0);
  const float weight_0 = r.weights[0];
  each<n>([&](int i) { m[i] = weight_0 * p0[i]; });
  FASTGUIDE_ROLL
  for (int k = 1; k < count; ++k) {
    const Bits<n> bits = k == 1 ? e.second : load<n>(launch.predictions[k], sample, place);
    values_of<n>(bits, launch.predictions[k].element, p);
    const float weight = r.weights[k];
    each<n>([&](int i) { m[i] = fused(weight, p[i] - p0[i], m[i]); });
  }
}

// Whether a tensor holds the gradient of what this row has left in the history.
__device__ bool has_left(const BackwardLaunch& launch, const Row<float>& row) {
  return launch.grad_left.data != nullptr && writes_history(row, launch.slots);
}

// The loads that most steps need are issued before the first of them is used.
template <int n>
__device__ void start(const BackwardLaunch& launch, const BackwardRow& r, int64_t sample, int64_t place,
                      Elements<n>& e) {
  const StepArguments& a = launch.a;
  const Row<float>& row = *r.row;
  const bool weighs = r.clips || launch.sums != nullptr;
  Bits<n> in{}, x{};
  if (launch.grad_out.data != nullptr) in = load<n>(launch.grad_out, sample, place);
  if (weighs && a.num_predictions > 0) e.first = load<n>(launch.predictions[0], sample, place);
  if (weighs && a.num_predictions > 1) e.second = load<n>(launch.predictions[1], sample, place);
  if (r.clips) x = load<n>(a.sample, sample, place);
  values_of<n>(in, launch.grad_out.element, e.in);
  if (a.mask.data != nullptr) {
    float mask[n];
    load_values<n>(a.mask, sample, place, mask);
    each<n>([&](int i) { e.in[i] *= mask[i]; });
  }
  if (!r.in_table) each<n>([&](int i) { e.in[i] = NAN; });
  load_values<n>(launch.grad_original, sample, place, e.q);
  if (has_left(launch, row)) {
    load_values<n>(launch.grad_left, int64_t(row.hist_slot) * a.batch + sample, place, e.left);
  }
  const float of_next = row.out_x0, of_left = row.hist_x0;
  each<n>([&](int i) { e.q[i] = sum_of_two(of_next, e.in[i], of_left, e.left[i]) + e.q[i]; });
  load_values<n>(a.gradient, sample, place, e.g);
  if (!r.clips) return;
  float values[n], m[n];
  values_of<n>(x, a.sample.element, values);
  guided<n>(launch, r, e, sample, place, m);
  const Row<float> c = with_gradient_scale(row, r.scale);
  each<n>([&](int i) {
    const float x0 = unclipped_original<float, true, true>(c, values[i], m[i], e.g[i]);
    if (x0 > c.clip || x0 < -c.clip) e.q[i] = 0.0f;
  });
}

// The gradients of the guided prediction and of the gradient, the latter without its scale.
template <int n>
__device__ void find_gradients(const StepArguments& a, const Row<float>& c, int64_t sample, int64_t place,
                               Elements<n>& e) {
  const float m_of_q = c.x0_pred * c.x0_scale, m_of_in = c.out_pred;
  const float g_of_q = c.x0_grad * c.x0_scale, g_of_in = c.out_grad;
  each<n>([&](int i) {
    e.dm[i] = sum_of_two(m_of_q, e.q[i], m_of_in, e.in[i]);
    e.dg[i] = sum_of_two(g_of_q, e.q[i], g_of_in, e.in[i]);
    e.sigma[i] = 1.0f;
  });
  if (a.variance.data == nullptr) return;
  load_values<n>(a.variance, sample, place, e.sigma);
  const float base = c.logvar_base, span = c.logvar_span, of_variance = c.out_var_grad;
  each<n>([&](int i) {
    e.sigma[i] = exponential(0.5f * fused(span, e.sigma[i], base));
    e.dg[i] += product(of_variance, e.sigma[i] * (e.sigma[i] * e.in[i]));
  });
}

// Computes what one output gets.
template <int n>
__device__ void make(const BackwardLaunch& launch, const BackwardRow& r, const GradientOutput& output, int64_t sample,
                     int64_t place, const Elements<n>& e, float (&values)[n]) {
  const StepArguments& a = launch.a;
  const Row<float>& c = *r.row;
  switch (output.of) {
    case Of::sample: {
      const float of_q = c.x0_sample * c.x0_scale, of_in = c.out_sample, of_left = c.hist_sample;
      return each<n>(
          [&](int i) { values[i] = sum_of_two(of_q, e.q[i], of_in, e.in[i]) + product(of_left, e.left[i]); });
    }
    case Of::prediction: {
      float weight = r.weights[output.number];
      FASTGUIDE_ROLL
      for (int k = 1; output.number == 0 && k < a.num_predictions; ++k) weight -= r.weights[k];
      return each<n>([&](int i) { values[i] = product(weight, e.dm[i]); });
    }
    case Of::gradient:
      return each<n>([&](int i) { values[i] = product(r.scale, e.dg[i]); });
    case Of::variance: {
      load_values<n>(a.noise, sample, place, values);
      const float of_noise = 0.5f * c.out_noise, of_g = c.out_var_grad * r.scale, span = c.logvar_span;
      return each<n>([&](int i) {
        const float in_sigma = e.sigma[i] * e.in[i];
        const float x = product(of_noise, in_sigma) * values[i];
        values[i] = sum_of_two(span, x, span, product(of_g, e.sigma[i] * in_sigma) * e.g[i]);
      });
    }
    case Of::noise: {
      load_values<n>(launch.grad_original, sample, place, values);
      const float of_in = c.out_noise, of_original = c.x0_noise;
      return each<n>([&](int i) { values[i] = sum_of_two(of_in, e.sigma[i] * e.in[i], of_original, values[i]); });
    }
    case Of::anchor: {
      const float of_in = c.out_anchor;
      return each<n>([&](int i) { values[i] = product(of_in, e.in[i]); });
    }
    case Of::history: {
      if (float(output.number) != c.hist_slot) {
        load_values<n>(launch.grad_left, output.number * a.batch + sample, place, values);
      }
      const float of_in = history_factor(c, output.number);
      return each<n>([&](int i) { values[i] = sum_of_two(of_in, e.in[i], 1.0f, values[i]); });
    }
  }
  FASTGUIDE_UNREACHABLE();
}

// ---- The gradients of weights ----

using Sums = double[kBackwardWarps][kMaxColumns];

// Adds what a warp's lanes have, by halves.
__device__ void add_lanes(float sum, int column, Sums& warps) {
#if defined(__CUDA_ARCH__)
  double value = double(sum);
  FASTGUIDE_ROLL
  for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, half);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][column] += value;
#else
  warps[0][column] += double(sum);
#endif
}

template <int n>
__device__ void add_columns(const BackwardLaunch& launch, const Elements<n>& e, int64_t sample, int64_t place,
                            bool inside, Sums& warps) {
  const int count = launch.a.num_predictions;
  float p0[n] = {}, p[n];
  FASTGUIDE_ROLL
  for (int k = 0; k < count; ++k) {
    float sum = 0.0f;
    if (inside) {
      const Bits<n> bits = k == 0 ? e.first : k == 1 ? e.second : load<n>(launch.predictions[k], sample, place);
      values_of<n>(bits, launch.predictions[k].element, p);
      each<n>([&](int i) { sum = fused(e.dm[i], p[i] - p0[i], sum); });
      if (k == 0) each<n>([&](int i) { p0[i] = p[i]; });
    }
    add_lanes(sum, k, warps);
  }
  float sum = 0.0f;
  each<n>([&](int i) { sum = fused(e.dg[i], e.g[i], sum); });
  add_lanes(sum, weight_columns(launch.a) - 1, warps);
}

// Writes what the block's warps have added, in their order. On a host, whose threads run one after the other and
// thread 0 last, that thread has it all.
__device__ void write_sums(const BackwardLaunch& launch, Sums& warps) {
  const int columns = weight_columns(launch.a);
  __syncthreads();
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    double total = warps[0][column];
    FASTGUIDE_ROLL
    for (int k = 1; k < kBackwardWarps; ++k) total += warps[k][column];
    launch.sums[int64_t(blockIdx.x) * columns + column] = total;
#if !defined(__CUDA_ARCH__)
    if (threadIdx.x == 0) warps[0][column] = 0.0;  // for the next block
#endif
  }
}

// ---- The kernel ----

template <int n>
__device__ void backward_of(const BackwardLaunch& launch, const BackwardRow& r, int64_t sample, int64_t place,
                            Sums& warps) {
  const bool inside = place < launch.a.elements_per_sample;
  Elements<n> e{};
  if (inside) {
    start<n>(launch, r, sample, place, e);
    find_gradients<n>(launch.a, *r.row, sample, place, e);
    FASTGUIDE_ROLL
    for (int k = 0; k < launch.outputs; ++k) {
      float values[n] = {};
      make<n>(launch, r, launch.output[k], sample, place, e, values);
      store<n>(values, launch.output[k].to, sample, place);
    }
  }
  if (launch.sums != nullptr) add_columns<n>(launch, e, sample, place, inside, warps);
}

__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    backward_kernel(const __grid_constant__ BackwardLaunch launch) {
  __shared__ Sums warps;
  const uint32_t sample = quotient(blockIdx.x, launch.tiles_per_sample);
  const int64_t tile = int64_t(blockIdx.x - sample * launch.tiles_per_sample.divisor) * kBackwardTile;
  const int64_t size = launch.a.elements_per_sample;
  const BackwardRow r = backward_row(launch.a, sample);
#if defined(__CUDA_ARCH__)  // on a host, whose threads run one after the other, they are 0 already
  if (launch.sums != nullptr) {
    for (int k = threadIdx.x; k < kBackwardWarps * kMaxColumns; k += kBackwardThreads) (&warps[0][0])[k] = 0.0;
    __syncthreads();
  }
#endif
  if (launch.aligned && (tile + kBackwardTile <= size || size % kVector == 0)) {
    backward_of<kVector>(launch, r, sample, tile + int64_t(threadIdx.x) * kVector, warps);
  } else {
    FASTGUIDE_ROLL
    for (int k = 0; k < kVector; ++k) {
      backward_of<1>(launch, r, sample, tile + k * kBackwardThreads + threadIdx.x, warps);
    }
  }
  if (launch.sums != nullptr) write_sums(launch, warps);
}

}  // namespace

cudaError_t launch_backward(const BackwardLaunch& launch, cudaStream_t stream) {
  void* parameters[] = {const_cast<BackwardLaunch*>(&launch)};
  const void* kernel = reinterpret_cast<const void*>(backward_kernel);
  const dim3 blocks(static_cast<unsigned>(launch.tiles));
  return cudaLaunchKernel(kernel, blocks, dim3(kBackwardThreads), parameters, 0, stream);
}

}  // namespace cuda
}  // namespace fastguide
