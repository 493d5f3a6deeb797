// What one thread of the GPU kernel does: which elements it computes, and how it reads and writes them.
//
// A launch has a number of tiles of kThreads threads each. No thread waits for another, so the same code runs on the
// host in a loop over tiles and threads: the tests do that, without a GPU. step.cu makes kernels of it.
//
// Within a sample, a thread computes a vector: kVector neighbouring elements, read and written 16 bytes at a time. The
// first vector starts where every tensor is at a multiple of 16 bytes; if there is no such element, all are computed
// one by one. So are the elements before the first vector and those behind the last. With torch's noise for a tensor
// larger than torch's own grid, a thread computes the four vectors whose noise comes of the same Philox calls.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/cursor.h"
#include "kernels/gpu/vector.h"
#include "maths/element.h"
#include "maths/inline.h"
#include "maths/philox.h"
#include "maths/step.h"

namespace fastguide {

constexpr int kThreads = 128;
constexpr int kTile = kThreads * kVector;
constexpr int64_t kMaxTiles = 0x7FFFFFFF;
constexpr int kTorchValues = 4;  // values of one Philox call, which torch gives to elements `threads` apart

// The kernel's parameters.
struct Launch {
  StepArguments a;  // its predictions are null: they are the next member
  Input predictions[kMaxPredictions];
  int64_t tiles;          // the launch is refused if they are more than kMaxTiles
  uint32_t vector_tiles;  // of a sample; one more may hold single elements
  uint32_t tiles_per_sample;
  bool aligned;     // every sample of every tensor begins at a multiple of 16 bytes
  bool per_sample;  // samples differ in their row or weights
};

// What a kernel is compiled for. predictions: 1, 2, or 0 for a number known at run time. extras: any of gradient,
// learned variance and mask, see has_extras. Noise::given is also for a step without noise.
template <int predictions_, bool extras_, Noise noise_, bool original_, bool staged_>
struct Variant {
  static constexpr int predictions = predictions_;
  static constexpr bool extras = extras_, original = original_, staged = staged_;
  static constexpr Noise noise = noise_;
};

// ---- Rows ----

struct SampleRow {
  Row<float> c;  // with the gradient's scale in it
  PairWeights<float> pair;
  const float* weights;
  uint32_t step;  // counted from the sample's first one, for the portable noise
};

// Whether the step has a tensor that only kernels with extras read.
FASTGUIDE_INLINE bool has_extras(const StepArguments& a) {
  bool extras = false;
  for_each_input(a, [&](Argument name, const Input& input) {
    extras = extras || (name != Argument::sample && name != Argument::noise && input.data != nullptr);
  });
  return extras;
}

template <typename V>
FASTGUIDE_INLINE SampleRow row_of(const Launch& launch, int64_t sample, const Position& position) {
  const StepArguments& a = launch.a;
  const bool inside = in_table(a, position);  // checked here because the host does not read device indices
  const int64_t row = inside ? position.index : 0;
  SampleRow r;
  r.weights = static_cast<const float*>(a.weights) + row * a.weights_step_stride + sample * a.weights_batch_stride;
  const int count = V::predictions > 0 ? V::predictions : a.num_predictions;
  r.c = with_gradient_scale(row_at<float>(a, row), gradient_scale(r.weights, count));
  r.pair = pair_weights(r.weights, count);
  r.step = uint32_t(row - position.first);
  if (!inside) r.c.x0_sample = r.c.out_sample = NAN;
  if (V::extras && a.variance.data == nullptr) r.c.logvar_base = r.c.logvar_span = r.c.out_var_grad = 0.0f;
  return r;
}

// ---- Noise ----

// Rounds a value to a dtype: torch.randn of a 16-bit dtype is float32's, rounded.
FASTGUIDE_INLINE float rounded_as(Element element, float value) {
  switch (element) {
    case Element::bfloat16:
      return from_bfloat16(to_bfloat16(value));
    case Element::float16:
      return from_float16(to_float16(value));
    case Element::float32:
    case Element::float64:
      return value;
  }
  FASTGUIDE_UNREACHABLE();
}

template <typename V>
FASTGUIDE_INLINE float draw_one(const Launch& launch, const TorchStream& stream, uint32_t step, int64_t sample,
                                int64_t place) {
  const StepArguments& a = launch.a;
  const int64_t counted = counted_place(place, a.channels, a.elements_per_sample);
  if constexpr (V::noise == Noise::portable) {
    return portable_normal_of(uint64_t(a.seeds[sample * a.seeds_stride]), step, uint64_t(counted));
  } else {
    const uint64_t element = uint64_t(sample * a.elements_per_sample + counted);
    return rounded_as(a.sample.element, torch_normal(stream.seed, stream.offset, element, stream.threads));
  }
}

// Draws a vector of the portable stream, which is the values of two Philox calls: vector_start makes it so.
FASTGUIDE_INLINE void draw_vector(const Launch& launch, uint32_t step, int64_t sample, int64_t place,
                                  float (&z)[kVector]) {
  const uint64_t seed = uint64_t(launch.a.seeds[sample * launch.a.seeds_stride]);
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; i += 4) {
    const Normal4 normal = portable_normal(seed, step, uint64_t(place + i) / 4);
    z[i] = normal.first;
    z[i + 1] = normal.second;
    z[i + 2] = normal.third;
    z[i + 3] = normal.fourth;
  }
}

// ---- The step ----

// An absent gradient is left out rather than 0, because 0 times an infinite variance is NaN. For an absent variance,
// row_of has set the row's factors to 0.
template <typename V>
FASTGUIDE_INLINE StepResult<float> step_extras(const StepArguments& a, const Row<float>& c, float x, float m, float g,
                                               float v, float z) {
  if constexpr (!V::extras) return step_element<float, true, false, false, true>(c, x, m, g, v, z);
  if (a.gradient.data == nullptr) return step_element<float, true, false, true, true>(c, x, m, g, v, z);
  return step_element<float, true, true, true, true>(c, x, m, g, v, z);
}

template <typename V>
FASTGUIDE_INLINE void step_one(const Launch& launch, const SampleRow& r, const TorchStream& stream, int64_t sample,
                               int64_t place) {
  const StepArguments& a = launch.a;
  const int count = V::predictions > 0 ? V::predictions : a.num_predictions;
  const bool gradient = V::extras && a.gradient.data != nullptr, variance = V::extras && a.variance.data != nullptr;
  const bool given = V::noise == Noise::given && a.noise.data != nullptr;
  const uint32_t sample_bits = load_bits(a.sample, sample, place);
  const uint32_t first_bits = count > 0 ? load_bits(launch.predictions[0], sample, place) : 0;
  const uint32_t second_bits = V::predictions == 2 ? load_bits(launch.predictions[1], sample, place) : 0;
  const uint32_t gradient_bits = gradient ? load_bits(a.gradient, sample, place) : 0;
  const uint32_t variance_bits = variance ? load_bits(a.variance, sample, place) : 0;
  const uint32_t noise_bits = given ? load_bits(a.noise, sample, place) : 0;
  float z = 0.0f;
  if constexpr (V::noise != Noise::given) z = draw_one<V>(launch, stream, r.step, sample, place);
  if (given) z = value_of(noise_bits, a.noise.element);

  float m = 0.0f;
  if (count > 0) {
    const float p0 = value_of(first_bits, launch.predictions[0].element);
    if (V::predictions == 2) {
      m = guided_prediction(r.pair, p0, value_of(second_bits, launch.predictions[1].element));
    } else {
      m = r.weights[0] * p0;
      if (V::predictions == 0) {
        FASTGUIDE_ROLL
        for (int k = 1; k < count; ++k) {
          m += r.weights[k] *
               (value_of(load_bits(launch.predictions[k], sample, place), launch.predictions[k].element) - p0);
        }
      }
    }
  }
  const float x = value_of(sample_bits, a.sample.element);
  const float g = gradient ? value_of(gradient_bits, a.gradient.element) : 0.0f;
  const float v = variance ? value_of(variance_bits, a.variance.element) : 0.0f;
  StepResult<float> result = step_extras<V>(a, r.c, x, m, g, v, z);
  if (V::extras && a.mask.data != nullptr) {
    const uint32_t mask_bits = load_bits(a.mask, sample, place), known_bits = load_bits(a.known, sample, place);
    const uint32_t z_bits = load_bits(a.known_noise, sample, place);
    result.sample = with_known(r.c, result.sample, value_of(mask_bits, a.mask.element),
                               value_of(known_bits, a.known.element), value_of(z_bits, a.known_noise.element));
  }
  store_one(result.sample, a.out, sample, place);
  if constexpr (V::original) store_one(result.original, a.original, sample, place);
  if constexpr (V::staged) {
    FASTGUIDE_ROLL
    for (int k = 0; k < a.staged_copies; ++k) {
      store_one(r.c.in_scale * result.sample, a.staged, k * a.batch + sample, place);
    }
  }
}

struct RawInputs {
  Raw sample, first, second, gradient, variance, noise;
};

template <typename V>
FASTGUIDE_INLINE RawInputs load_inputs(const Launch& launch, int64_t sample, int64_t place) {
  const StepArguments& a = launch.a;
  RawInputs raw;
  raw.sample = load_raw(a.sample, sample, place);
  if (V::predictions > 0 || a.num_predictions > 0) raw.first = load_raw(launch.predictions[0], sample, place);
  if constexpr (V::predictions == 2) raw.second = load_raw(launch.predictions[1], sample, place);
  if (V::extras && a.gradient.data != nullptr) raw.gradient = load_raw(a.gradient, sample, place);
  if (V::extras && a.variance.data != nullptr) raw.variance = load_raw(a.variance, sample, place);
  if (V::noise == Noise::given && a.noise.data != nullptr) raw.noise = load_raw(a.noise, sample, place);
  return raw;
}

template <typename V>
FASTGUIDE_INLINE void combine_vector(const Launch& launch, const SampleRow& r, const RawInputs& raw, int64_t sample,
                                     int64_t place, float (&m)[kVector]) {
  float p0[kVector] = {}, p[kVector];
  if (V::predictions > 0 || launch.a.num_predictions > 0) unpack(raw.first, launch.predictions[0].element, p0);
  if constexpr (V::predictions == 2) {
    unpack(raw.second, launch.predictions[1].element, p);
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) m[i] = guided_prediction(r.pair, p0[i], p[i]);
  } else {
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) m[i] = r.weights[0] * p0[i];
    if constexpr (V::predictions == 0) {
      for (int k = 1; k < launch.a.num_predictions; ++k) {
        unpack(load_raw(launch.predictions[k], sample, place), launch.predictions[k].element, p);
        const float weight = r.weights[k];
        FASTGUIDE_UNROLL
        for (int i = 0; i < kVector; ++i) m[i] += weight * (p[i] - p0[i]);
      }
    }
  }
}

// These are loaded late because a mask is rare: no register holds them while the step is computed.
FASTGUIDE_INLINE void blend_vector(const StepArguments& a, const Row<float>& c, float (&x)[kVector], int64_t sample,
                                   int64_t place) {
  const Raw raw_mask = load_raw(a.mask, sample, place), raw_known = load_raw(a.known, sample, place);
  const Raw raw_z = load_raw(a.known_noise, sample, place);
  float mask[kVector], known[kVector], z[kVector];
  unpack(raw_mask, a.mask.element, mask);
  unpack(raw_known, a.known.element, known);
  unpack(raw_z, a.known_noise.element, z);
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) x[i] = with_known(c, x[i], mask[i], known[i], z[i]);
}

// z is the noise, unless it is given.
template <typename V>
FASTGUIDE_INLINE void step_vector(const Launch& launch, const SampleRow& r, const RawInputs& raw, float (&z)[kVector],
                                  int64_t sample, int64_t place) {
  const StepArguments& a = launch.a;
  float x[kVector], m[kVector], g[kVector] = {}, v[kVector] = {};
  unpack(raw.sample, a.sample.element, x);
  combine_vector<V>(launch, r, raw, sample, place, m);
  if (V::extras && a.gradient.data != nullptr) unpack(raw.gradient, a.gradient.element, g);
  if (V::extras && a.variance.data != nullptr) unpack(raw.variance, a.variance.element, v);
  if (V::noise == Noise::given && a.noise.data != nullptr) unpack(raw.noise, a.noise.element, z);
  float original[kVector];
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const StepResult<float> result = step_extras<V>(a, r.c, x[i], m[i], g[i], v[i], z[i]);
    x[i] = result.sample;
    original[i] = result.original;
  }
  if (V::extras && a.mask.data != nullptr) blend_vector(a, r.c, x, sample, place);
  store_vector(x, a.out, sample, place);
  if constexpr (V::original) store_vector(original, a.original, sample, place);
  if constexpr (V::staged) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] *= r.c.in_scale;
    FASTGUIDE_ROLL
    for (int k = 0; k < a.staged_copies; ++k) store_vector(x, a.staged, k * a.batch + sample, place);
  }
}

// ---- From threads to elements ----

// Where the vectors of a sample may start, for the tensors seen so far: at `first` modulo 2^period_bits. first is -1 if
// no element is at a multiple of 16 bytes in all of them.
struct VectorStart {
  int first, period_bits;
};

FASTGUIDE_INLINE VectorStart with_tensor(VectorStart start, const void* data, int64_t sample, int64_t batch_stride,
                                         Element element) {
  if (data == nullptr || start.first < 0) return start;
  const int size_bits = element_size_bits(element), period_bits = 4 - size_bits;
  const uint64_t begin = reinterpret_cast<uint64_t>(data) + (uint64_t(sample * batch_stride) << size_bits);
  const int first = int((16 - (begin & 15)) & 15) >> size_bits;
  const int common = period_bits < start.period_bits ? period_bits : start.period_bits;
  if (((first ^ start.first) & ((1 << common) - 1)) != 0) return {-1, 0};
  return period_bits > start.period_bits ? VectorStart{first, period_bits} : start;
}

// The sample's first element that begins a vector; -1 if there are no vectors.
FASTGUIDE_INLINE int vector_start(const Launch& launch, int64_t sample) {
  const StepArguments& a = launch.a;
  if (a.noise_kind == Noise::portable && a.channels != 1) return -1;  // a Philox call's elements are apart in memory
  if (launch.aligned) return 0;
  VectorStart start = {0, a.noise_kind == Noise::portable ? 2 : 0};  // a Philox call has four neighbours
  for_each_input(a, launch.predictions, [&](Argument, const Input& input) {
    start = with_tensor(start, input.data, sample, input.batch_stride, input.element);
  });
  for_each_output(a, [&](Argument, const Output& output, int copies) {
    FASTGUIDE_ROLL
    for (int k = 0; k < copies; ++k) {
      start = with_tensor(start, output.data, k * a.batch + sample, output.batch_stride, output.element);
    }
  });
  return start.first;
}

FASTGUIDE_INLINE int64_t sample_of(const Launch& launch, uint32_t tile) { return tile / launch.tiles_per_sample; }

// position is that of the tile's sample.
template <typename V>
FASTGUIDE_INLINE void step_tile(const Launch& launch, const Position& position, uint32_t tile, int thread) {
  if (!position.live) return;
  const int64_t sample = sample_of(launch, tile);
  const int64_t chunk = tile % launch.tiles_per_sample;
  const int64_t size = launch.a.elements_per_sample;
  const int start = vector_start(launch, sample);
  const int64_t place = start + chunk * kTile + thread * kVector;
  const bool whole = start >= 0 && place + kVector <= size;
  RawInputs raw;
  if (whole) raw = load_inputs<V>(launch, sample, place);
  const SampleRow r = row_of<V>(launch, sample, position);
  if (whole) {
    float z[kVector] = {};
    if constexpr (V::noise == Noise::portable) draw_vector(launch, r.step, sample, place, z);
    step_vector<V>(launch, r, raw, z, sample, place);
  }
  if (start >= 0 && chunk < launch.vector_tiles) return;
  // Single elements: all of the chunk, or, in one more chunk, those before the first vector and behind the last.
  int64_t next = chunk * kTile + thread, end = next < size ? (chunk + 1) * kTile : 0;
  end = end < size ? end : size;
  if (start >= 0) {
    const int64_t behind = size > start ? (size - start) / kVector * kVector + start : size;
    next = thread < start ? thread : behind + thread - start;
    end = next < size && (thread < start || next >= behind) ? next + 1 : 0;
  }
  FASTGUIDE_ROLL
  for (; next < end; next += kThreads) step_one<V>(launch, r, TorchStream{}, sample, next);
}

// The torch stream for any tensor, one element a thread.
template <typename V>
FASTGUIDE_INLINE void torch_single_tile(const Launch& launch, const TorchStream& stream, const Position& position,
                                        uint32_t tile, int thread) {
  const int64_t sample = sample_of(launch, tile);
  const int64_t place = int64_t(tile % launch.tiles_per_sample) * kThreads + thread;
  if (!position.live || place >= launch.a.elements_per_sample) return;
  step_one<V>(launch, row_of<V>(launch, sample, position), stream, sample, place);
}

// Whether the torch stream is drawn in vectors: a thread then computes the four vectors whose values are made by the
// same Philox calls. They are those of contiguous samples made of aligned vectors, in tensors larger than torch's grid.
FASTGUIDE_INLINE bool torch_vectors_fit(const Launch& launch) {
  const int64_t total = launch.a.batch * launch.a.elements_per_sample, threads = launch.a.torch_stream.threads;
  return launch.aligned && launch.a.channels == 1 && launch.a.elements_per_sample % kVector == 0 &&
         threads % kVector == 0 && total > threads && total <= 0x7FFFFFFF;
}

FASTGUIDE_INLINE uint32_t torch_units(const StepArguments& a) {  // the number of threads for that
  const int64_t round = int64_t(a.torch_stream.threads) * kTorchValues;
  return uint32_t((a.batch * a.elements_per_sample + round - 1) / round) * (a.torch_stream.threads / kVector);
}

// shared has kTorchValues * kVector * kThreads floats of the block, of which each thread uses its own. position is that
// of the first sample, and of all samples if there is a cursor.
template <typename V>
FASTGUIDE_INLINE void torch_vector_tile(const Launch& launch, const TorchStream& stream, const Position& position,
                                        uint32_t tile, int thread, float* shared) {
  if (!position.live) return;
  const StepArguments& a = launch.a;
  const uint32_t unit = tile * kThreads + thread, units_per_call = stream.threads / kVector;
  const uint32_t call = unit / units_per_call, torch_thread = (unit - call * units_per_call) * kVector;
  float* z = shared + thread;
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const Philox4 r = torch_call(stream.seed, stream.offset, call, torch_thread + i);
    const Normal2 low = torch_normal(r.x, r.y), high = torch_normal(r.z, r.w);
    z[(0 * kVector + i) * kThreads] = low.first;
    z[(1 * kVector + i) * kThreads] = low.second;
    z[(2 * kVector + i) * kThreads] = high.first;
    z[(3 * kVector + i) * kThreads] = high.second;
  }
  SampleRow r = row_of<V>(launch, 0, position);
  FASTGUIDE_ROLL
  for (int value = 0; value < kTorchValues; ++value) {
    const int64_t element = (int64_t(call) * kTorchValues + value) * stream.threads + torch_thread;
    if (element >= a.batch * a.elements_per_sample) return;
    const uint32_t sample = uint32_t(element) / uint32_t(a.elements_per_sample);
    const int64_t place = element - sample * a.elements_per_sample;
    const RawInputs raw = load_inputs<V>(launch, sample, place);
    if (launch.per_sample) r = row_of<V>(launch, sample, a.cursor != nullptr ? position : position_of(a, sample));
    float values[kVector];
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      values[i] = rounded_as(a.sample.element, z[(value * kVector + i) * kThreads]);
    }
    step_vector<V>(launch, r, raw, values, sample, place);
  }
}

}  // namespace fastguide
