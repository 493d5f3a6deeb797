// The GPU kernel, one thread at a time: which elements a thread computes, and how it reads and writes them.
//
// A launch is a number of tiles of kThreads threads each. No thread waits for another, so the same code runs on the
// host in a loop over tiles and threads; that is how it is tested without a GPU. step.cu makes kernels of it.
//
// Within a sample, a thread computes kVector neighbouring elements, read and written 16 bytes at a time. Where the
// sample does not begin at a multiple of 16 bytes, a head of single elements comes first; where its tensors are at
// odds about that, all elements are single. The rest behind the last vector is single as well.
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
constexpr int kMaxPredictions = 16;
constexpr int64_t kMaxTiles = 0x7FFFFFFF;
constexpr int kTorchValues = 4;  // values of one Philox call, which torch deals out `threads` elements apart

struct GpuStep {
  StepArguments a;  // without its predictions, which are here
  Input predictions[kMaxPredictions];
  int64_t tiles;          // of the launch: at most kMaxTiles, or it cannot be
  uint32_t vector_tiles;  // of a sample; one more may hold single elements
  uint32_t tiles_per_sample;
  bool aligned;     // every sample of every tensor begins at a multiple of 16 bytes
  bool per_sample;  // samples differ in their row or weights
};

// What the kernel is compiled for. predictions: 1, 2, or 0 for a number known at run time. extras: gradient, learned
// variance and mask, as they are there. Noise::given: also none.
template <int predictions_, bool extras_, Noise noise_, bool original_, bool staged_>
struct Variant {
  static constexpr int predictions = predictions_;
  static constexpr bool extras = extras_, original = original_, staged = staged_;
  static constexpr Noise noise = noise_;
};

// ---- Rows ----

struct SampleRow {
  Coefficients<float> c;
  const float* weights;
  uint32_t step;
};

template <typename V>
FASTGUIDE_INLINE SampleRow row_of(const GpuStep& s, int64_t sample, const Position& position) {
  const StepArguments& a = s.a;
  const bool inside = in_table(a, position);  // the host does not read device indices, so they are checked here
  const int64_t row = inside ? position.index : 0;
  SampleRow r;
  r.weights = static_cast<const float*>(a.weights) + row * a.weights_step_stride + sample * a.weights_batch_stride;
  r.c = coefficients(static_cast<const float*>(a.rows) + row * num_columns, r.weights,
                     V::predictions > 0 ? V::predictions : a.num_predictions);
  r.step = uint32_t(row - position.first);
  if (!inside) r.c.x0_sample = r.c.out_sample = NAN;
  if (V::predictions == 0) r.c.weight_sum = 1.0f;  // m comes combined
  if (V::extras && a.variance.data == nullptr) r.c.logvar_base = r.c.logvar_span = r.c.out_var_grad = 0.0f;
  return r;
}

// ---- Noise ----

// torch.randn of a 16-bit dtype is float32's, rounded.
FASTGUIDE_INLINE float rounded_as(Element element, float value) {
  if (element == Element::bfloat16) return from_bfloat16(to_bfloat16(value));
  if (element == Element::float16) return from_float16(to_float16(value));
  return value;
}

template <typename V>
FASTGUIDE_INLINE float draw_one(const GpuStep& s, const TorchStream& stream, uint32_t step, int64_t sample,
                                int64_t place) {
  const StepArguments& a = s.a;
  const int64_t counted = counted_place(place, a.channels, a.elements_per_sample);
  if constexpr (V::noise == Noise::portable) {
    return portable_normal_of(uint64_t(a.seeds[sample * a.seeds_stride]), step, uint64_t(counted));
  } else {
    const uint64_t element = uint64_t(sample * a.elements_per_sample + counted);
    return rounded_as(a.sample.element, torch_normal(stream.seed, stream.offset, element, stream.threads));
  }
}

// Of the portable stream, where a vector is what two Philox calls give; head_of sees to that.
FASTGUIDE_INLINE void draw_vector(const GpuStep& s, uint32_t step, int64_t sample, int64_t place, float (&z)[kVector]) {
  const uint64_t seed = uint64_t(s.a.seeds[sample * s.a.seeds_stride]);
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

// A gradient that is not there is left out, as 0 would not do: times an infinite variance it is NaN. A variance that is
// not there has the row's factors at 0, see row_of.
template <typename V>
FASTGUIDE_INLINE StepResult<float> step_extras(const StepArguments& a, const Coefficients<float>& c, float x, float m,
                                               float g, float v, float z) {
  if constexpr (!V::extras) return step_element<float, true, false, false, true>(c, x, m, g, v, z);
  if (a.gradient.data == nullptr) return step_element<float, true, false, true, true>(c, x, m, g, v, z);
  return step_element<float, true, true, true, true>(c, x, m, g, v, z);
}

template <typename V>
FASTGUIDE_INLINE void step_one(const GpuStep& s, const SampleRow& r, const TorchStream& stream, int64_t sample,
                               int64_t place) {
  const StepArguments& a = s.a;
  const int count = V::predictions > 0 ? V::predictions : a.num_predictions;
  const bool gradient = V::extras && a.gradient.data != nullptr, variance = V::extras && a.variance.data != nullptr;
  const bool given = V::noise == Noise::given && a.noise.data != nullptr;
  const uint32_t sample_bits = load_bits(a.sample, sample, place);
  const uint32_t first_bits = count > 0 ? load_bits(s.predictions[0], sample, place) : 0;
  const uint32_t second_bits = V::predictions == 2 ? load_bits(s.predictions[1], sample, place) : 0;
  const uint32_t gradient_bits = gradient ? load_bits(a.gradient, sample, place) : 0;
  const uint32_t variance_bits = variance ? load_bits(a.variance, sample, place) : 0;
  const uint32_t noise_bits = given ? load_bits(a.noise, sample, place) : 0;
  float z = 0.0f;
  if constexpr (V::noise != Noise::given) z = draw_one<V>(s, stream, r.step, sample, place);
  if (given) z = value_of(noise_bits, a.noise.element);

  float m = 0.0f;
  if (count > 0) {
    const float p0 = value_of(first_bits, s.predictions[0].element);
    if (V::predictions == 2) {
      m = guided_prediction(r.c, p0, value_of(second_bits, s.predictions[1].element));
    } else {
      m = r.weights[0] * p0;
      if (V::predictions == 0) {
        FASTGUIDE_ROLL
        for (int k = 1; k < count; ++k) {
          m += r.weights[k] * (value_of(load_bits(s.predictions[k], sample, place), s.predictions[k].element) - p0);
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
FASTGUIDE_INLINE RawInputs load_inputs(const GpuStep& s, int64_t sample, int64_t place) {
  const StepArguments& a = s.a;
  RawInputs raw;
  raw.sample = load_raw(a.sample, sample, place);
  if (V::predictions > 0 || a.num_predictions > 0) raw.first = load_raw(s.predictions[0], sample, place);
  if constexpr (V::predictions == 2) raw.second = load_raw(s.predictions[1], sample, place);
  if (V::extras && a.gradient.data != nullptr) raw.gradient = load_raw(a.gradient, sample, place);
  if (V::extras && a.variance.data != nullptr) raw.variance = load_raw(a.variance, sample, place);
  if (V::noise == Noise::given && a.noise.data != nullptr) raw.noise = load_raw(a.noise, sample, place);
  return raw;
}

template <typename V>
FASTGUIDE_INLINE void combine_vector(const GpuStep& s, const SampleRow& r, const RawInputs& raw, int64_t sample,
                                     int64_t place, float (&m)[kVector]) {
  float p0[kVector] = {}, p[kVector];
  if (V::predictions > 0 || s.a.num_predictions > 0) unpack(raw.first, s.predictions[0].element, p0);
  if constexpr (V::predictions == 2) {
    unpack(raw.second, s.predictions[1].element, p);
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) m[i] = guided_prediction(r.c, p0[i], p[i]);
  } else {
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) m[i] = r.weights[0] * p0[i];
    if constexpr (V::predictions == 0) {
      for (int k = 1; k < s.a.num_predictions; ++k) {
        unpack(load_raw(s.predictions[k], sample, place), s.predictions[k].element, p);
        const float weight = r.weights[k];
        FASTGUIDE_UNROLL
        for (int i = 0; i < kVector; ++i) m[i] += weight * (p[i] - p0[i]);
      }
    }
  }
}

// Loaded late, as a mask is rare: nothing that a plain step needs waits in registers for it.
FASTGUIDE_INLINE void blend_vector(const StepArguments& a, const Coefficients<float>& c, float (&x)[kVector],
                                   int64_t sample, int64_t place) {
  const Raw raw_mask = load_raw(a.mask, sample, place), raw_known = load_raw(a.known, sample, place);
  const Raw raw_z = load_raw(a.known_noise, sample, place);
  float mask[kVector], known[kVector], z[kVector];
  unpack(raw_mask, a.mask.element, mask);
  unpack(raw_known, a.known.element, known);
  unpack(raw_z, a.known_noise.element, z);
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) x[i] = with_known(c, x[i], mask[i], known[i], z[i]);
}

// z: the noise, unless it is given.
template <typename V>
FASTGUIDE_INLINE void step_vector(const GpuStep& s, const SampleRow& r, const RawInputs& raw, float (&z)[kVector],
                                  int64_t sample, int64_t place) {
  const StepArguments& a = s.a;
  float x[kVector], m[kVector], g[kVector] = {}, v[kVector] = {};
  unpack(raw.sample, a.sample.element, x);
  combine_vector<V>(s, r, raw, sample, place, m);
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

// Where in a sample vectors may begin, as far as the tensors looked at so far say: at elements first modulo
// 2^period_bits; first is -1 if they are at odds.
struct Head {
  int first, period_bits;
};

FASTGUIDE_INLINE Head with_tensor(Head head, const void* data, int64_t sample, int64_t batch_stride, Element element) {
  if (data == nullptr || head.first < 0) return head;
  const int size_bits = element == Element::float32 ? 2 : 1, period_bits = 4 - size_bits;
  const uint64_t begin = reinterpret_cast<uint64_t>(data) + (uint64_t(sample * batch_stride) << size_bits);
  const int first = int((16 - (begin & 15)) & 15) >> size_bits;
  const int common = period_bits < head.period_bits ? period_bits : head.period_bits;
  if (((first ^ head.first) & ((1 << common) - 1)) != 0) return {-1, 0};
  return period_bits > head.period_bits ? Head{first, period_bits} : head;
}

FASTGUIDE_INLINE int head_of(const GpuStep& s, int64_t sample) {
  if (s.a.noise_kind == Noise::portable && s.a.channels != 1) return -1;  // not of neighbours in memory
  if (s.aligned) return 0;
  const StepArguments& a = s.a;
  Head head = {0, a.noise_kind == Noise::portable ? 2 : 0};  // a Philox call gives four neighbours
  head = with_tensor(head, a.sample.data, sample, a.sample.batch_stride, a.sample.element);
  head = with_tensor(head, a.out.data, sample, a.out.batch_stride, a.out.element);
  head = with_tensor(head, a.original.data, sample, a.original.batch_stride, a.original.element);
  head = with_tensor(head, a.gradient.data, sample, a.gradient.batch_stride, a.gradient.element);
  head = with_tensor(head, a.variance.data, sample, a.variance.batch_stride, a.variance.element);
  head = with_tensor(head, a.noise.data, sample, a.noise.batch_stride, a.noise.element);
  head = with_tensor(head, a.mask.data, sample, a.mask.batch_stride, a.mask.element);
  head = with_tensor(head, a.known.data, sample, a.known.batch_stride, a.known.element);
  head = with_tensor(head, a.known_noise.data, sample, a.known_noise.batch_stride, a.known_noise.element);
  FASTGUIDE_ROLL
  for (int k = 0; k < a.num_predictions; ++k) {
    const Input& input = s.predictions[k];
    head = with_tensor(head, input.data, sample, input.batch_stride, input.element);
  }
  FASTGUIDE_ROLL
  for (int k = 0; k < a.staged_copies; ++k) {
    head = with_tensor(head, a.staged.data, k * a.batch + sample, a.staged.batch_stride, a.staged.element);
  }
  return head.first;
}

FASTGUIDE_INLINE int64_t sample_of(const GpuStep& s, uint32_t tile) { return tile / s.tiles_per_sample; }

// position: that of the tile's sample.
template <typename V>
FASTGUIDE_INLINE void step_tile(const GpuStep& s, const Position& position, uint32_t tile, int thread) {
  if (!position.live) return;
  const int64_t sample = sample_of(s, tile);
  const int64_t chunk = tile % s.tiles_per_sample;
  const int64_t size = s.a.elements_per_sample;
  const int head = head_of(s, sample);
  const int64_t place = head + chunk * kTile + thread * kVector;
  const bool whole = head >= 0 && place + kVector <= size;
  RawInputs raw;
  if (whole) raw = load_inputs<V>(s, sample, place);
  const SampleRow r = row_of<V>(s, sample, position);
  if (whole) {
    float z[kVector] = {};
    if constexpr (V::noise == Noise::portable) draw_vector(s, r.step, sample, place, z);
    step_vector<V>(s, r, raw, z, sample, place);
  }
  if (head >= 0 && chunk < s.vector_tiles) return;
  // Single elements: all of the chunk, or, in one more chunk, those before the first vector and behind the last.
  int64_t next = chunk * kTile + thread, end = next < size ? (chunk + 1) * kTile : 0;
  end = end < size ? end : size;
  if (head >= 0) {
    const int64_t behind = size > head ? (size - head) / kVector * kVector + head : size;
    next = thread < head ? thread : behind + thread - head;
    end = next < size && (thread < head || next >= behind) ? next + 1 : 0;
  }
  FASTGUIDE_ROLL
  for (; next < end; next += kThreads) step_one<V>(s, r, TorchStream{}, sample, next);
}

// The torch stream for any tensor, one element a thread: at most torch's grid, and then there is no more to share.
template <typename V>
FASTGUIDE_INLINE void torch_single_tile(const GpuStep& s, const TorchStream& stream, const Position& position,
                                        uint32_t tile, int thread) {
  const int64_t sample = sample_of(s, tile);
  const int64_t place = int64_t(tile % s.tiles_per_sample) * kThreads + thread;
  if (!position.live || place >= s.a.elements_per_sample) return;
  step_one<V>(s, row_of<V>(s, sample, position), stream, sample, place);
}

// The torch stream for tensors larger than torch's grid: a thread computes the four vectors whose values come of the
// same Philox calls. For contiguous samples that consist of aligned vectors.
FASTGUIDE_INLINE bool torch_vectors_fit(const GpuStep& s) {
  const int64_t total = s.a.batch * s.a.elements_per_sample, threads = s.a.torch_stream.threads;
  return s.aligned && s.a.channels == 1 && s.a.elements_per_sample % kVector == 0 && threads % kVector == 0 &&
         total > threads && total <= 0x7FFFFFFF;
}

FASTGUIDE_INLINE uint32_t torch_units(const StepArguments& a) {  // how many threads that takes
  const int64_t round = int64_t(a.torch_stream.threads) * kTorchValues;
  return uint32_t((a.batch * a.elements_per_sample + round - 1) / round) * (a.torch_stream.threads / kVector);
}

// shared: kTorchValues * kVector * kThreads floats of the block, of which each thread uses its own. position: that of
// the first sample, which is all samples' if there is a cursor.
template <typename V>
FASTGUIDE_INLINE void torch_vector_tile(const GpuStep& s, const TorchStream& stream, const Position& position,
                                        uint32_t tile, int thread, float* shared) {
  if (!position.live) return;
  const StepArguments& a = s.a;
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
  SampleRow r = row_of<V>(s, 0, position);
  FASTGUIDE_ROLL
  for (int value = 0; value < kTorchValues; ++value) {
    const int64_t element = (int64_t(call) * kTorchValues + value) * stream.threads + torch_thread;
    if (element >= a.batch * a.elements_per_sample) return;
    const uint32_t sample = uint32_t(element) / uint32_t(a.elements_per_sample);
    const int64_t place = element - sample * a.elements_per_sample;
    const RawInputs raw = load_inputs<V>(s, sample, place);
    if (s.per_sample) r = row_of<V>(s, sample, a.cursor != nullptr ? position : position_of(a, sample));
    float values[kVector];
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      values[i] = rounded_as(a.sample.element, z[(value * kVector + i) * kThreads]);
    }
    step_vector<V>(s, r, raw, values, sample, place);
  }
}

// ---- The launch ----

FASTGUIDE_INLINE bool begins_aligned(const void* data, int64_t batch, int64_t batch_stride, Element element) {
  return reinterpret_cast<int64_t>(data) % 16 == 0 && (batch <= 1 || batch_stride * element_bytes(element) % 16 == 0);
}

// The kernel's parameters, and how many tiles there are in them.
inline GpuStep gpu_step(const StepArguments& a) {
  GpuStep s{};
  s.a = a;
  s.a.predictions = nullptr;
  // Without noise and gradient a learned variance has no use; it may be anything, and is not read.
  if (a.noise_kind == Noise::none && a.gradient.data == nullptr) s.a.variance = Input{};
  for (int k = 0; k < a.num_predictions; ++k) s.predictions[k] = a.predictions[k];
  s.per_sample = (a.indices != nullptr && a.indices_stride != 0) || a.cursor_stride != 0 || a.weights_batch_stride != 0;
  s.aligned = true;
  const auto consider = [&](const void* data, int64_t batch, int64_t batch_stride, Element element) {
    s.aligned = s.aligned && (data == nullptr || begins_aligned(data, batch, batch_stride, element));
  };
  for (const Input* input :
       {&s.a.sample, &s.a.gradient, &s.a.variance, &s.a.noise, &s.a.mask, &s.a.known, &s.a.known_noise}) {
    consider(input->data, a.batch, input->batch_stride, input->element);
  }
  for (int k = 0; k < a.num_predictions; ++k) {
    consider(s.predictions[k].data, a.batch, s.predictions[k].batch_stride, s.predictions[k].element);
  }
  for (const Output* output : {&a.out, &a.original}) {
    consider(output->data, a.batch, output->batch_stride, output->element);
  }
  consider(a.staged.data, a.batch * a.staged_copies, a.staged.batch_stride, a.staged.element);

  const int64_t size = a.elements_per_sample;
  if (a.noise_kind == Noise::torch_stream) {
    s.a.torch_stream.increment = torch_increment(uint64_t(a.batch * size), a.torch_stream.threads);
  }
  int64_t tiles_per_sample = (size + kThreads - 1) / kThreads;
  if (a.noise_kind != Noise::torch_stream) {
    const int64_t vector_tiles = (size + kTile - 1) / kTile;
    tiles_per_sample = vector_tiles + (!s.aligned || size % kVector != 0);
    s.vector_tiles = uint32_t(vector_tiles);
  }
  s.tiles_per_sample = uint32_t(tiles_per_sample);
  s.tiles = a.batch * tiles_per_sample;
  if (a.noise_kind == Noise::torch_stream && torch_vectors_fit(s)) s.tiles = (torch_units(a) + kThreads - 1) / kThreads;
  return s;
}

}  // namespace fastguide
