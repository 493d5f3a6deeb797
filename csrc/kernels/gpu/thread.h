// What one thread of the GPU kernel does with the elements that it has: rows, noise, the step of a vector or of one
// element. tiles.h says which elements those are.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/cursor.h"
#include "kernels/gpu/parameters.h"
#include "kernels/gpu/vector.h"
#include "maths/element.h"
#include "maths/inline.h"
#include "maths/philox.h"
#include "maths/step.h"

namespace fastguide {

// ---- Rows ----

struct SampleRow {
  Row<float> c;  // with the gradient's scale in it
  PairWeights<float> pair;
  const float* weights;
  uint32_t step;  // counted from the sample's first one, for the portable noise
};

// weights: the sample's; null: they are among the arguments.
template <typename V>
FASTGUIDE_INLINE SampleRow row_of(const Launch& launch, int64_t sample, const Position& position,
                                  const float* weights = nullptr) {
  const StepArguments& a = launch.a;
  const bool inside = in_table(a, position);  // checked here because the host does not read device indices
  const int64_t row = inside ? position.index : 0;
  SampleRow r;
  r.weights = weights != nullptr ? weights
                                 : static_cast<const float*>(a.weights) + row * a.weights_step_stride +
                                       sample * a.weights_batch_stride;
  const int count = V::predictions > 0 ? V::predictions : a.num_predictions;
  r.c = with_gradient_scale(row_at<float>(a, row), gradient_scale(r.weights, count));
  if (a.inverse_thresholds != nullptr) {
    r.c = with_threshold(r.c, static_cast<const float*>(a.inverse_thresholds)[sample * a.inverse_thresholds_stride]);
  }
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
FASTGUIDE_INLINE float draw_single(const Launch& launch, const TorchStream& stream, uint32_t step, int64_t sample,
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

// Draws elements whose neighbours in memory are not neighbours in the stream, which has a channel's elements together.
FASTGUIDE_INLINE void draw_channels(const StepArguments& a, uint64_t seed, uint32_t step, int64_t place,
                                    float (&z)[kVector]) {
  const int64_t per_channel = a.elements_per_sample / a.channels;
  int64_t inner = place / a.channels, channel = place - inner * a.channels;
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector; ++i) {
    const float value = portable_normal_of(seed, step, uint64_t(channel * per_channel + inner));
    FASTGUIDE_UNROLL
    for (int j = 1; j < kVector; ++j) z[j - 1] = z[j];  // the loop's index would put z into memory
    z[kVector - 1] = value;
    if (++channel == a.channels) channel = 0, ++inner;
  }
}

// Draws a vector, or half of one, of the portable stream that is the values of whole Philox calls.
template <int n>
FASTGUIDE_INLINE void draw_calls(uint64_t seed, uint32_t step, int64_t place, float (&z)[n]) {
  FASTGUIDE_UNROLL
  for (int i = 0; i < n; i += 4) {
    const Normal4 normal = portable_normal(seed, step, uint64_t(place + i) / 4);
    z[i] = normal.first;
    z[i + 1] = normal.second;
    z[i + 2] = normal.third;
    z[i + 3] = normal.fourth;
  }
}

// Draws any vector of the portable stream: vector_start makes it one of two Philox calls, unless there are channels.
FASTGUIDE_INLINE void draw_vector(const StepArguments& a, uint32_t step, int64_t sample, int64_t place,
                                  float (&z)[kVector]) {
  const uint64_t seed = uint64_t(a.seeds[sample * a.seeds_stride]);
  if (a.channels != 1) return draw_channels(a, seed, step, place, z);
  draw_calls(seed, step, place, z);
}

// ---- The step ----

// Whether a kernel that looks for noise adds any: where the kernel does that is compiled for such a step. That of any
// extras leaves out what has a factor of 0.
FASTGUIDE_INLINE bool adds_noise(const StepArguments& a, const Row<float>& c) {
  return extras_of(a) == Extras::any ? c.out_noise != 0.0f : a.noise_kind != Noise::none;
}

// The element's x0 before it is clipped, and its next sample. An absent gradient is left out rather than 0, because 0
// times an infinite variance is NaN. For an absent variance, row_of has set the row's factors to 0.
template <typename V>
FASTGUIDE_INLINE float original_of(const StepArguments& a, const Row<float>& c, float x, float m, float g) {
  if (!V::extras || a.gradient.data == nullptr) return unclipped_original<float, true, false>(c, x, m, g);
  return unclipped_original<float, true, true>(c, x, m, g);
}

template <typename V>
FASTGUIDE_INLINE float next_of(const StepArguments& a, const Row<float>& c, float x0, float x, float m, float g,
                               float v, float z) {
  constexpr bool has_noise = V::noise != Noise::none;
  if (V::looks_for_noise && !adds_noise(a, c))
    return next_sample<float, true, false, false, false>(c, x0, x, m, g, v, z);
  if constexpr (!V::extras) return next_sample<float, true, false, false, has_noise>(c, x0, x, m, g, v, z);
  if (a.gradient.data == nullptr) return next_sample<float, true, false, true, has_noise>(c, x0, x, m, g, v, z);
  return next_sample<float, true, true, true, has_noise>(c, x0, x, m, g, v, z);
}

struct SingleInputs {  // the bits of one element
  uint32_t sample, first, second, gradient, variance, noise;
};

template <typename V>
FASTGUIDE_INLINE SingleInputs load_single(const Launch& launch, int64_t sample, int64_t place) {
  const StepArguments& a = launch.a;
  SingleInputs bits{};
  bits.sample = load_bits(a.sample, sample, place);
  if (V::predictions > 0 || a.num_predictions > 0) bits.first = load_bits(launch.predictions[0], sample, place);
  if constexpr (V::predictions == 2) bits.second = load_bits(launch.predictions[1], sample, place);
  if (V::extras && a.gradient.data != nullptr) bits.gradient = load_bits(a.gradient, sample, place);
  if (V::extras && a.variance.data != nullptr) bits.variance = load_bits(a.variance, sample, place);
  if (V::noise == Noise::given && a.noise.data != nullptr) bits.noise = load_bits(a.noise, sample, place);
  return bits;
}

template <typename V>
FASTGUIDE_INLINE float combine_single(const Launch& launch, const SampleRow& r, const SingleInputs& bits,
                                      int64_t sample, int64_t place) {
  if (V::predictions == 0 && launch.a.num_predictions == 0) return 0.0f;
  const float p0 = value_of(bits.first, launch.predictions[0].element);
  if (V::predictions == 2) return guided_prediction(r.pair, p0, value_of(bits.second, launch.predictions[1].element));
  float m = r.weights[0] * p0;
  if constexpr (V::predictions == 0) {
    FASTGUIDE_ROLL
    for (int k = 1; k < launch.a.num_predictions; ++k) {
      const float p = value_of(load_bits(launch.predictions[k], sample, place), launch.predictions[k].element);
      m = fused(r.weights[k], p - p0, m);
    }
  }
  return m;
}

// ---- The history: loaded late, as its row says what of it is read ----

// One slot as a tensor to read, or to write.
FASTGUIDE_INLINE Input slot_of(const StepArguments& a, int slot) {
  const int64_t begin = slot * a.batch * a.history.batch_stride * int64_t(sizeof(float));
  return {static_cast<const char*>(a.history.data) + begin, a.history.batch_stride, Element::float32};
}

FASTGUIDE_INLINE Output written_slot_of(const StepArguments& a, int slot) {
  return {const_cast<void*>(slot_of(a, slot).data), a.history.batch_stride, Element::float32};
}

FASTGUIDE_INLINE float single_with_history(const StepArguments& a, const Row<float>& c, float next, float x0, float x,
                                           int64_t sample, int64_t place) {
  if (a.anchor.data != nullptr && c.out_anchor != 0.0f) {
    next = fused(c.out_anchor, value_of(load_bits(a.anchor, sample, place), a.anchor.element), next);
  }
  FASTGUIDE_UNROLL
  for (int slot = 0; slot < kMaxSlots; ++slot) {
    const float factor = history_factor(c, slot);
    if (slot >= a.history_slots || factor == 0.0f) continue;
    next = fused(factor, float_of(load_bits(slot_of(a, slot), sample, place)), next);
  }
  if (writes_history(c, a.history_slots)) {
    store_one(history_entry(c, x0, x), written_slot_of(a, int(c.hist_slot)), sample, place);
  }
  return next;
}

template <int n>
FASTGUIDE_INLINE void vector_with_history(const StepArguments& a, const Row<float>& c, float (&next)[n],
                                          const float (&x0)[n], const float (&x)[n], int64_t sample, int64_t place) {
  float values[n];
  if (a.anchor.data != nullptr && c.out_anchor != 0.0f) {
    unpack(load_raw<n>(a.anchor, sample, place), a.anchor.element, values);
    FASTGUIDE_UNROLL
    for (int i = 0; i < n; ++i) next[i] = fused(c.out_anchor, values[i], next[i]);
  }
  FASTGUIDE_UNROLL
  for (int slot = 0; slot < kMaxSlots; ++slot) {
    const float factor = history_factor(c, slot);
    if (slot >= a.history_slots || factor == 0.0f) continue;
    unpack(load_raw<n>(slot_of(a, slot), sample, place), Element::float32, values);
    FASTGUIDE_UNROLL
    for (int i = 0; i < n; ++i) next[i] = fused(factor, values[i], next[i]);
  }
  if (!writes_history(c, a.history_slots)) return;
  FASTGUIDE_UNROLL
  for (int i = 0; i < n; ++i) values[i] = history_entry(c, x0[i], x[i]);
  store_vector(values, written_slot_of(a, int(c.hist_slot)), sample, place);
}

template <typename V>
FASTGUIDE_INLINE void step_single(const Launch& launch, const SampleRow& r, const SingleInputs& bits,
                                  const TorchStream& stream, int64_t sample, int64_t place) {
  const StepArguments& a = launch.a;
  const float x = value_of(bits.sample, a.sample.element), m = combine_single<V>(launch, r, bits, sample, place);
  const float g = V::extras && a.gradient.data != nullptr ? value_of(bits.gradient, a.gradient.element) : 0.0f;
  const float v = V::extras && a.variance.data != nullptr ? value_of(bits.variance, a.variance.element) : 0.0f;
  float z = 0.0f;
  if constexpr (V::draws) z = draw_single<V>(launch, stream, r.step, sample, place);
  if (V::noise == Noise::given && a.noise.data != nullptr) z = value_of(bits.noise, a.noise.element);
  float x0 = clipped(original_of<V>(a, r.c, x, m, g), r.c.clip);
  float next = next_of<V>(a, r.c, x0, x, m, g, v, z);
  if constexpr (V::history) next = single_with_history(a, r.c, next, x0, x, sample, place);
  if (V::extras && a.mask.data != nullptr) {
    const uint32_t mask_bits = load_bits(a.mask, sample, place), known_bits = load_bits(a.known, sample, place);
    const uint32_t z_bits = load_bits(a.known_noise, sample, place);
    next = with_known(r.c, next, value_of(mask_bits, a.mask.element), value_of(known_bits, a.known.element),
                      value_of(z_bits, a.known_noise.element));
  }
  store_one(next, a.out, sample, place);
  if (V::original && (!V::looks_for_outputs || a.original.data != nullptr)) {
    if (V::noise != Noise::none && r.c.x0_noise != 0.0f) x0 = fused(r.c.x0_noise, z, x0);
    store_one(x0, a.original, sample, place);
  }
  if (V::staged && (!V::looks_for_outputs || a.staged.data != nullptr)) {
    FASTGUIDE_ROLL
    for (int k = 0; k < a.staged_copies; ++k) store_one(r.c.in_scale * next, a.staged, k * a.batch + sample, place);
  }
}

struct RawInputs {
  Raw sample, first, second, gradient, variance, noise;
};

template <typename V>
FASTGUIDE_INLINE RawInputs load_inputs(const Launch& launch, int64_t sample, int64_t place) {
  const StepArguments& a = launch.a;
  RawInputs raw;
  raw.sample = load_raw<V::width>(a.sample, sample, place);
  if (V::predictions > 0 || a.num_predictions > 0) raw.first = load_raw<V::width>(launch.predictions[0], sample, place);
  if constexpr (V::predictions == 2) raw.second = load_raw<V::width>(launch.predictions[1], sample, place);
  if (V::extras && a.gradient.data != nullptr) raw.gradient = load_raw<V::width>(a.gradient, sample, place);
  if (V::extras && a.variance.data != nullptr) raw.variance = load_raw<V::width>(a.variance, sample, place);
  if (V::noise == Noise::given && a.noise.data != nullptr) raw.noise = load_raw<V::width>(a.noise, sample, place);
  return raw;
}

// AnyRow is SampleRow, or what has its members in a block's memory: no register then holds what is not used yet.
template <typename V, typename AnyRow>
FASTGUIDE_INLINE void combine_vector(const Launch& launch, const AnyRow& r, const RawInputs& raw, int64_t sample,
                                     int64_t place, float (&m)[V::width]) {
  float p0[V::width] = {}, p[V::width];
  if (V::predictions > 0 || launch.a.num_predictions > 0) unpack(raw.first, launch.predictions[0].element, p0);
  if constexpr (V::predictions == 2) {
    unpack(raw.second, launch.predictions[1].element, p);
    FASTGUIDE_UNROLL
    for (int i = 0; i < V::width; ++i) m[i] = guided_prediction(r.pair, p0[i], p[i]);
  } else {
    FASTGUIDE_UNROLL
    for (int i = 0; i < V::width; ++i) m[i] = r.weights[0] * p0[i];
    if constexpr (V::predictions == 0) {
      for (int k = 1; k < launch.a.num_predictions; ++k) {
        unpack(load_raw<V::width>(launch.predictions[k], sample, place), launch.predictions[k].element, p);
        const float weight = r.weights[k];
        FASTGUIDE_UNROLL
        for (int i = 0; i < V::width; ++i) m[i] = fused(weight, p[i] - p0[i], m[i]);
      }
    }
  }
}

// These are loaded late because a mask is rare: no register holds them while the step is computed.
template <int n>
FASTGUIDE_INLINE void blend_vector(const StepArguments& a, const Row<float>& c, float (&x)[n], int64_t sample,
                                   int64_t place) {
  const Raw raw_mask = load_raw<n>(a.mask, sample, place), raw_known = load_raw<n>(a.known, sample, place);
  const Raw raw_z = load_raw<n>(a.known_noise, sample, place);
  float mask[n], known[n], z[n];
  unpack(raw_mask, a.mask.element, mask);
  unpack(raw_known, a.known.element, known);
  unpack(raw_z, a.known_noise.element, z);
  FASTGUIDE_UNROLL
  for (int i = 0; i < n; ++i) x[i] = with_known(c, x[i], mask[i], known[i], z[i]);
}

// z is the noise, unless it is given.
template <typename V, typename AnyRow>
FASTGUIDE_INLINE void step_vector(const Launch& launch, const AnyRow& r, const RawInputs& raw, float (&z)[V::width],
                                  int64_t sample, int64_t place) {
  const StepArguments& a = launch.a;
  float x[V::width], m[V::width], g[V::width] = {}, v[V::width] = {};
  unpack(raw.sample, a.sample.element, x);
  combine_vector<V>(launch, r, raw, sample, place, m);
  if (V::extras && a.gradient.data != nullptr) unpack(raw.gradient, a.gradient.element, g);
  if (V::extras && a.variance.data != nullptr) unpack(raw.variance, a.variance.element, v);
  if (V::noise == Noise::given && a.noise.data != nullptr) unpack(raw.noise, a.noise.element, z);
  float x0[V::width];
  FASTGUIDE_UNROLL
  for (int i = 0; i < V::width; ++i) x0[i] = original_of<V>(a, r.c, x[i], m[i], g[i]);
  if (r.c.clip < INFINITY) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < V::width; ++i) x0[i] = clipped(x0[i], r.c.clip);
  }
  float next[V::width];
  FASTGUIDE_UNROLL
  for (int i = 0; i < V::width; ++i) next[i] = next_of<V>(a, r.c, x0[i], x[i], m[i], g[i], v[i], z[i]);
  if constexpr (V::history) vector_with_history(a, r.c, next, x0, x, sample, place);
  if (V::extras && a.mask.data != nullptr) blend_vector(a, r.c, next, sample, place);
  store_vector(next, a.out, sample, place);
  if (V::original && (!V::looks_for_outputs || a.original.data != nullptr)) {
    if (V::noise != Noise::none && r.c.x0_noise != 0.0f) {
      FASTGUIDE_UNROLL
      for (int i = 0; i < V::width; ++i) x0[i] = fused(r.c.x0_noise, z[i], x0[i]);
    }
    store_vector(x0, a.original, sample, place);
  }
  if (V::staged && (!V::looks_for_outputs || a.staged.data != nullptr)) {
    FASTGUIDE_UNROLL
    for (int i = 0; i < V::width; ++i) next[i] *= r.c.in_scale;
    FASTGUIDE_ROLL
    for (int k = 0; k < a.staged_copies; ++k) store_vector(next, a.staged, k * a.batch + sample, place);
  }
}

}  // namespace fastguide
