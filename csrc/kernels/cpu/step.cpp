// The CPU kernel: one pass over memory, in blocks that stay in the first-level cache.
//
// Compiled once for each instruction set, with FASTGUIDE_ISA naming its namespace; the compiler vectorises the loops.
// No templates of the standard library here: their code could be shared with another instruction set's.
#include "kernels/cpu/launch.h"

#include <cstring>

#include "kernels/cpu/convert.h"
#include "kernels/cursor.h"
#include "maths/step.h"

#if defined(__clang__)
#define FASTGUIDE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTGUIDE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

template <typename T>
struct Run {  // where the elements of one block are, as T
  const T *x, *p0, *p1, *g, *v, *z;
  T *out, *original;
};

template <typename T, int predictions, bool has_gradient, bool has_variance, bool has_noise, bool has_original>
void step_run(const Coefficients<T>& coefficients, const Run<T>& run, int64_t count) {
  const Coefficients<T> c = coefficients;
  const Run<T> r = run;
  // An output may be one of the inputs, element for element: no iteration reads what another writes.
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    T m = T(0);
    if constexpr (predictions == 1) m = c.weight_sum * r.p0[i];
    if constexpr (predictions == 2) m = guided_prediction(c, r.p0[i], r.p1[i]);
    const StepResult<T> result = step_element<T, (predictions > 0), has_gradient, has_variance, has_noise>(
        c, r.x[i], m, has_gradient ? r.g[i] : T(0), has_variance ? r.v[i] : T(0), has_noise ? r.z[i] : T(0));
    r.out[i] = result.sample;
    if constexpr (has_original) r.original[i] = result.original;
  }
}

template <typename T>
using StepRun = void (*)(const Coefficients<T>&, const Run<T>&, int64_t);

template <typename T, int predictions>
StepRun<T> choose_run(bool gradient, bool variance, bool noise, bool original) {
  static constexpr StepRun<T> kRuns[16] = {
      step_run<T, predictions, false, false, false, false>, step_run<T, predictions, false, false, false, true>,
      step_run<T, predictions, false, false, true, false>,  step_run<T, predictions, false, false, true, true>,
      step_run<T, predictions, false, true, false, false>,  step_run<T, predictions, false, true, false, true>,
      step_run<T, predictions, false, true, true, false>,   step_run<T, predictions, false, true, true, true>,
      step_run<T, predictions, true, false, false, false>,  step_run<T, predictions, true, false, false, true>,
      step_run<T, predictions, true, false, true, false>,   step_run<T, predictions, true, false, true, true>,
      step_run<T, predictions, true, true, false, false>,   step_run<T, predictions, true, true, false, true>,
      step_run<T, predictions, true, true, true, false>,    step_run<T, predictions, true, true, true, true>,
  };
  return kRuns[8 * gradient + 4 * variance + 2 * noise + original];
}

template <typename T>
FASTGUIDE_INLINE T value_of(T stored) {
  return stored;
}

template <typename T>
FASTGUIDE_INLINE T value_of(uint16_t bfloat16) {
  return T(from_bfloat16(bfloat16));
}

// m = weight p_0, or what m is, and then + sum_k weights[k] (others[k] - p_0): a pass over `more` of the others.
template <typename T, typename Stored, int more, bool begins>
void add_guidance(T weight, const T* weights, const Stored* first, const Stored* const* others, int64_t count, T* m) {
  T w[more];
  const Stored* p[more];
  for (int k = 0; k < more; ++k) {
    w[k] = weights[k];
    p[k] = others[k];
  }
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const T p0 = value_of<T>(first[i]);
    T sum = begins ? weight * p0 : m[i];
    for (int k = 0; k < more; ++k) sum += w[k] * (value_of<T>(p[k][i]) - p0);
    m[i] = sum;
  }
}

template <typename T>  // predictions beside the first that one pass takes; double is not worth its code
constexpr int together = sizeof(T) == sizeof(float) ? 3 : 1;

template <typename T, typename Stored, bool begins>
void add_guidance(int more, T weight, const T* weights, const Stored* first, const Stored* const* others, int64_t count,
                  T* m) {
  if (more == 1) add_guidance<T, Stored, 1, begins>(weight, weights, first, others, count, m);
  if constexpr (together<T> == 3) {
    if (more == 2) add_guidance<T, Stored, 2, begins>(weight, weights, first, others, count, m);
    if (more == 3) add_guidance<T, Stored, 3, begins>(weight, weights, first, others, count, m);
  }
}

// m of three and more predictions; find(k, n) is where prediction k is, and may put it into the n-th place.
template <typename T, typename Stored, typename Find>
void combine(int num_predictions, const T* weights, const Find& find, int64_t count, T* m) {
  const Stored* first = find(0, 0);
  for (int k = 1; k < num_predictions; k += together<T>) {
    const int left = num_predictions - k, more = left < together<T> ? left : together<T>;
    const Stored* others[together<T>] = {};
    for (int n = 0; n < more; ++n) others[n] = find(k + n, n + 1);
    if (k == 1) {
      add_guidance<T, Stored, true>(more, weights[0], weights + k, first, others, count, m);
    } else {
      add_guidance<T, Stored, false>(more, weights[0], weights + k, first, others, count, m);
    }
  }
}

template <typename T>
const T* draw(const StepArguments& a, int64_t sample, uint32_t step, int64_t offset, int64_t count, T* z) {
  if constexpr (sizeof(T) == sizeof(float)) {
    portable_noise(a, sample, step, offset, count, z);
  } else {
    float values[kBlock];
    portable_noise(a, sample, step, offset, count, values);
    for (int64_t i = 0; i < count; ++i) z[i] = T(values[i]);
  }
  return z;
}

// ---- The step of a model of 16 bits without noise, converted in registers ----

constexpr int64_t kChunk = 32;  // a loop over 16 would be unrolled before it is vectorised, and then not be

template <Element state, Element prediction, int predictions>
void step_chunks(const StepArguments& a, const Coefficients<float>& coefficients, int64_t sample, int64_t begin,
                 int64_t end) {
  const Coefficients<float> c = coefficients;
  constexpr int64_t state_bytes = state == Element::float32 ? 4 : 2, bytes = 2;  // of an element
  const Input& last = a.predictions[predictions - 1];
  const char* x = static_cast<const char*>(a.sample.data) + (sample * a.sample.batch_stride + begin) * state_bytes;
  const char* p0 =
      static_cast<const char*>(a.predictions[0].data) + (sample * a.predictions[0].batch_stride + begin) * bytes;
  const char* p1 = static_cast<const char*>(last.data) + (sample * last.batch_stride + begin) * bytes;
  char* out = static_cast<char*>(a.out.data) + (sample * a.out.batch_stride + begin) * state_bytes;
  alignas(64) char rest[4][kChunk * sizeof(float)] = {};
  for (int64_t left = end - begin; left > 0; left -= kChunk) {
    char* to = out;
    if (left < kChunk) {  // computed in the same way, so that no bit depends on where a range ends
      std::memcpy(rest[0], x, left * state_bytes);
      std::memcpy(rest[1], p0, left * bytes);
      std::memcpy(rest[2], p1, left * bytes);
      x = rest[0], p0 = rest[1], p1 = rest[2], to = rest[3];
    }
    alignas(64) float scratch[3][kChunk], result[kChunk];
    // With constants for their elements, nothing of load and store is left but the conversion.
    const float* sample_run = load(Input{x, 0, state}, 0, kChunk, scratch[0]);
    const float* p0_run = load(Input{p0, 0, prediction}, 0, kChunk, scratch[1]);
    const float* p1_run = predictions == 2 ? load(Input{p1, 0, prediction}, 0, kChunk, scratch[2]) : p0_run;
    for (int64_t j = 0; j < kChunk; ++j) {
      const float m = predictions == 2 ? guided_prediction(c, p0_run[j], p1_run[j]) : c.weight_sum * p0_run[j];
      result[j] = step_element<float, true, false, false, false>(c, sample_run[j], m, 0, 0, 0).sample;
    }
    store(result, Output{to, 0, state}, 0, kChunk);
    if (left < kChunk) {
      std::memcpy(out, to, left * state_bytes);
      return;
    }
    x += kChunk * state_bytes, p0 += kChunk * bytes, p1 += kChunk * bytes, out += kChunk * state_bytes;
  }
}

using StepChunks = void (*)(const StepArguments&, const Coefficients<float>&, int64_t, int64_t, int64_t);

// Null where there is more to do, or nothing to convert.
StepChunks choose_chunks(const StepArguments& a) {
  if (a.num_predictions < 1 || a.num_predictions > 2 || a.noise_kind != Noise::none || a.gradient.data != nullptr ||
      a.variance.data != nullptr || a.staged.data != nullptr || a.mask.data != nullptr || a.original.data != nullptr) {
    return nullptr;
  }
  const Element state = a.sample.element, prediction = a.predictions[0].element;
  const bool half = prediction == Element::float16, bfloat16 = prediction == Element::bfloat16;
  if (a.out.element != state || a.predictions[a.num_predictions - 1].element != prediction || !(half || bfloat16) ||
      !(state == prediction || state == Element::float32)) {
    return nullptr;
  }
  static constexpr StepChunks kChunks[8] = {
      step_chunks<Element::bfloat16, Element::bfloat16, 1>, step_chunks<Element::bfloat16, Element::bfloat16, 2>,
      step_chunks<Element::float32, Element::bfloat16, 1>,  step_chunks<Element::float32, Element::bfloat16, 2>,
      step_chunks<Element::float16, Element::float16, 1>,   step_chunks<Element::float16, Element::float16, 2>,
      step_chunks<Element::float32, Element::float16, 1>,   step_chunks<Element::float32, Element::float16, 2>,
  };
  return kChunks[4 * half + 2 * (state == Element::float32) + (a.num_predictions - 1)];
}

// ---- Blocks: every step ----

// Called, as conversions of four dtypes would be inlined a dozen times.
template <typename T>
__attribute__((noinline)) const T* load_block(const Input& input, int64_t offset, int64_t count, T* scratch) {
  return load(input, offset, count, scratch);
}

template <typename T>
__attribute__((noinline)) void store_block(const T* from, const Output& output, int64_t offset, int64_t count) {
  store(from, output, offset, count);
}

template <typename T>
void step_sample(const StepArguments& a, int64_t sample, int64_t begin, int64_t end) {
  const Position position = position_of(a, sample);
  if (!position.live) return;
  const int64_t row = position.index;
  const T* weights = static_cast<const T*>(a.weights) + row * a.weights_step_stride + sample * a.weights_batch_stride;
  Coefficients<T> c = coefficients(static_cast<const T*>(a.rows) + row * num_columns, weights, a.num_predictions);

  if constexpr (sizeof(T) == sizeof(float)) {
    if (const StepChunks chunks = choose_chunks(a)) return chunks(a, c, sample, begin, end);
  }

  const bool gradient = a.gradient.data != nullptr, variance = a.variance.data != nullptr;
  const bool noise = a.noise_kind != Noise::none, original = a.original.data != nullptr;
  const bool drawn = a.noise_kind == Noise::portable, staged = a.staged.data != nullptr;
  const bool masked = a.mask.data != nullptr;
  const bool many = a.num_predictions > 2;
  const StepRun<T> step_run = a.num_predictions == 0   ? choose_run<T, 0>(gradient, variance, noise, original)
                              : a.num_predictions == 2 ? choose_run<T, 2>(gradient, variance, noise, original)
                                                       : choose_run<T, 1>(gradient, variance, noise, original);
  if (many) c.weight_sum = T(1);  // m comes combined

  bool in_place = !many && !drawn && !staged && !masked && stored_as<T>(a.out.element) &&
                  stored_as<T>(a.sample.element) && (!original || stored_as<T>(a.original.element)) &&
                  (!gradient || stored_as<T>(a.gradient.element)) && (!variance || stored_as<T>(a.variance.element)) &&
                  (a.noise.data == nullptr || stored_as<T>(a.noise.element));
  for (int k = 0; k < a.num_predictions; ++k) in_place = in_place && stored_as<T>(a.predictions[k].element);
  bool as_bfloat16 = many && sizeof(T) == sizeof(float);  // converted where they are combined
  for (int k = 0; k < a.num_predictions; ++k) {
    as_bfloat16 = as_bfloat16 && a.predictions[k].element == Element::bfloat16;
  }
  const int64_t block = in_place ? end - begin : kBlock;  // nothing to convert: one run of all

  alignas(64) T scratch[9][kBlock];
  for (int64_t offset = begin; offset < end; offset += block) {
    const int64_t count = end - offset < block ? end - offset : block;
    const auto load_run = [&](const Input& input, T* into) {
      return load_block(input, sample * input.batch_stride + offset, count, into);
    };
    Run<T> run{};
    run.x = load_run(a.sample, scratch[0]);
    if (many) {
      T* const m = scratch[1];
      if (as_bfloat16) {
        const auto stored = [&](int k, int) {
          const Input& input = a.predictions[k];
          return static_cast<const uint16_t*>(input.data) + sample * input.batch_stride + offset;
        };
        if constexpr (sizeof(T) == sizeof(float)) combine<T, uint16_t>(a.num_predictions, weights, stored, count, m);
      } else {
        const auto converted = [&](int k, int place) { return load_run(a.predictions[k], scratch[2 + place]); };
        combine<T, T>(a.num_predictions, weights, converted, count, m);
      }
      run.p0 = m;
    } else {
      if (a.num_predictions > 0) run.p0 = load_run(a.predictions[0], scratch[1]);
      if (a.num_predictions > 1) run.p1 = load_run(a.predictions[1], scratch[2]);
    }
    if (gradient) run.g = load_run(a.gradient, scratch[3]);
    if (variance) run.v = load_run(a.variance, scratch[4]);
    if (drawn) {
      run.z = draw(a, sample, uint32_t(row - position.first), offset, count, scratch[5]);
    } else if (noise) {
      run.z = load_run(a.noise, scratch[5]);
    }
    const int64_t out_offset = sample * a.out.batch_stride + offset;
    const int64_t original_offset = sample * a.original.batch_stride + offset;
    const bool out_direct = stored_as<T>(a.out.element);
    const bool original_direct = original && stored_as<T>(a.original.element);
    run.out = out_direct ? static_cast<T*>(a.out.data) + out_offset : scratch[6];
    run.original = original_direct ? static_cast<T*>(a.original.data) + original_offset : scratch[7];
    step_run(c, run, count);
    if (masked) {
      const T *mask = load_run(a.mask, scratch[1]), *known = load_run(a.known, scratch[2]);
      const T* z = load_run(a.known_noise, scratch[3]);
      for (int64_t i = 0; i < count; ++i) run.out[i] = with_known(c, run.out[i], mask[i], known[i], z[i]);
    }
    if (!out_direct) store_block(run.out, a.out, out_offset, count);
    if (original && !original_direct) store_block(run.original, a.original, original_offset, count);
    if (staged) {
      for (int64_t i = 0; i < count; ++i) scratch[8][i] = c.in_scale * run.out[i];
      for (int k = 0; k < a.staged_copies; ++k) {
        store_block(scratch[8], a.staged, (k * a.batch + sample) * a.staged.batch_stride + offset, count);
      }
    }
  }
}

}  // namespace

void step_range(const StepArguments& a, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t sample = begin / a.elements_per_sample;
    const int64_t first = begin - sample * a.elements_per_sample;
    const int64_t left = a.elements_per_sample - first;
    const int64_t last = first + (end - begin < left ? end - begin : left);
    if (a.double_precision) {
      step_sample<double>(a, sample, first, last);
    } else {
      step_sample<float>(a, sample, first, last);
    }
    begin += last - first;
  }
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
