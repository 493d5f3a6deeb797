// The CPU kernel: one pass over memory, in blocks that stay in the first-level cache.
//
// Compiled once for each instruction set, with FASTGUIDE_ISA naming its namespace; the compiler vectorises the loops.
// It uses no templates of the standard library: the linker could share their code with another instruction set's.
#include "kernels/cpu/launch.h"

#include <cstring>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/history.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/original.h"
#include "kernels/cpu/stream.h"
#include "kernels/cursor.h"
#include "maths/step.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

template <typename T, int predictions, bool has_gradient, bool has_variance, bool has_noise, bool has_original>
void step_run(const Row<T>& row, const PairWeights<T>& pair, const Run<T>& run, int64_t count) {
  const Row<T> c = row;  // copies, which no output can alias
  const PairWeights<T> w = pair;
  const Run<T> r = run;
  // An output may be one of the inputs, element for element: no iteration reads what another writes.
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    T m = T(0);
    if constexpr (predictions == 1) m = w.sum * r.p0[i];
    if constexpr (predictions == 2) m = guided_prediction(w, r.p0[i], r.p1[i]);
    const T x = r.x[i], g = has_gradient ? r.g[i] : T(0), v = has_variance ? r.v[i] : T(0);
    const T z = has_noise ? r.z[i] : T(0);
    const T x0 = clipped(unclipped_original<T, (predictions > 0), has_gradient>(c, x, m, g), c.clip);
    r.out[i] = next_sample<T, (predictions > 0), has_gradient, has_variance, has_noise>(c, x0, x, m, g, v, z);
    if constexpr (has_original) r.original[i] = x0;
  }
}

template <typename T>
using StepRun = void (*)(const Row<T>&, const PairWeights<T>&, const Run<T>&, int64_t);

template <typename T, int predictions>
StepRun<T> choose_run(const StepArguments& a) {
  const bool gradient = a.gradient.data != nullptr, variance = a.variance.data != nullptr;
  const bool noise = a.noise_kind != Noise::none;
  const bool original = a.original.data != nullptr || a.history.data != nullptr;  // the history has x0 in it
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
StepRun<T> choose_run(const StepArguments& a) {
  if (a.num_predictions == 0) return choose_run<T, 0>(a);
  if (a.num_predictions == 2) return choose_run<T, 2>(a);
  return choose_run<T, 1>(a);  // three and more are combined into one
}

// ---- The plain step of a model of 16 bits, converted in registers; or of a large batch, written past the caches ----

constexpr int64_t kChunk = 32;  // the compiler unrolls a loop over 16 before it vectorises it, and then it does not
// Elements: so far ahead the sample and the predictions are fetched, which take longer when both are the same.
constexpr int64_t kSampleAhead = 1024, kPredictionsAhead = 512;

// streams: `begin` is then where the output is a multiple of 64.
template <Element state, Element prediction, int predictions>
void step_chunks(const StepArguments& a, const Row<float>& row, const PairWeights<float>& pair, int64_t sample,
                 int64_t begin, int64_t end, bool streams) {
  const Row<float> c = row;
  const PairWeights<float> w = pair;
  constexpr int64_t state_bytes = element_bytes(state), bytes = element_bytes(prediction);
  const Input& last = a.predictions[predictions - 1];
  const char* x = static_cast<const char*>(a.sample.data) + (sample * a.sample.batch_stride + begin) * state_bytes;
  const char* p0 =
      static_cast<const char*>(a.predictions[0].data) + (sample * a.predictions[0].batch_stride + begin) * bytes;
  const char* p1 = static_cast<const char*>(last.data) + (sample * last.batch_stride + begin) * bytes;
  char* out = static_cast<char*>(a.out.data) + (sample * a.out.batch_stride + begin) * state_bytes;
  alignas(64) char rest[4][kChunk * sizeof(float)] = {};
  for (int64_t left = end - begin; left > 0; left -= kChunk) {
    char* to = out;
    if (streams) {
      for (int64_t line = 0; line < kChunk * state_bytes; line += 64) fetch(x, kSampleAhead * state_bytes + line);
      for (int64_t line = 0; line < kChunk * bytes; line += 64) {
        fetch(p0, kPredictionsAhead * bytes + line);
        if constexpr (predictions == 2) fetch(p1, kPredictionsAhead * bytes + line);
      }
    }
    if (left < kChunk) {  // the last chunk is computed in the same way: no bit depends on where a range ends
      std::memcpy(rest[0], x, left * state_bytes);
      std::memcpy(rest[1], p0, left * bytes);
      std::memcpy(rest[2], p1, left * bytes);
      x = rest[0], p0 = rest[1], p1 = rest[2], to = rest[3];
    }
    alignas(64) float scratch[3][kChunk], result[kChunk];
    // The elements are constants, so that only the conversions are left of load and store.
    const float* sample_run = load(Input{x, 0, state}, 0, kChunk, scratch[0]);
    const float* p0_run = load(Input{p0, 0, prediction}, 0, kChunk, scratch[1]);
    const float* p1_run = predictions == 2 ? load(Input{p1, 0, prediction}, 0, kChunk, scratch[2]) : p0_run;
    for (int64_t j = 0; j < kChunk; ++j) {
      const float m = predictions == 2 ? guided_prediction(w, p0_run[j], p1_run[j]) : w.sum * p0_run[j];
      const float x = sample_run[j], x0 = clipped(unclipped_original<float, true, false>(c, x, m, 0), c.clip);
      result[j] = next_sample<float, true, false, false, false>(c, x0, x, m, 0, 0, 0);
    }
    if (streams && left >= kChunk) {
      alignas(64) char packed[kChunk * state_bytes];
      store(result, Output{packed, 0, state}, 0, kChunk);
      stream(packed, to, kChunk * state_bytes);
    } else {
      store(result, Output{to, 0, state}, 0, kChunk);
    }
    if (left < kChunk) {
      std::memcpy(out, to, left * state_bytes);
      return;
    }
    x += kChunk * state_bytes, p0 += kChunk * bytes, p1 += kChunk * bytes, out += kChunk * state_bytes;
  }
}

using StepChunks = void (*)(const StepArguments&, const Row<float>&, const PairWeights<float>&, int64_t, int64_t,
                            int64_t, bool);

// Whether the step reads and writes nothing but its sample and predictions.
bool is_plain(const StepArguments& a) {
  bool plain = a.noise_kind == Noise::none;
  for_each_input(a, [&](Argument name, const Input& input) {
    plain = plain && (name == Argument::sample || input.data == nullptr);
  });
  for_each_output(a, [&](Argument name, const Output& output, int) {
    plain = plain && (name == Argument::out || output.data == nullptr);
  });
  return plain;
}

// Returns null if there is more to do, or nothing to convert or to write past the caches.
StepChunks choose_chunks(const StepArguments& a, bool streams) {
  if (a.num_predictions < 1 || a.num_predictions > 2 || !is_plain(a)) return nullptr;
  const Element state = a.sample.element, prediction = a.predictions[0].element;
  const bool half = prediction == Element::float16, single = prediction == Element::float32;
  if (a.out.element != state || a.predictions[a.num_predictions - 1].element != prediction ||
      !(half || prediction == Element::bfloat16 || (single && streams)) ||
      !(state == prediction || state == Element::float32)) {
    return nullptr;
  }
  static constexpr StepChunks kChunks[10] = {
      step_chunks<Element::bfloat16, Element::bfloat16, 1>, step_chunks<Element::bfloat16, Element::bfloat16, 2>,
      step_chunks<Element::float32, Element::bfloat16, 1>,  step_chunks<Element::float32, Element::bfloat16, 2>,
      step_chunks<Element::float16, Element::float16, 1>,   step_chunks<Element::float16, Element::float16, 2>,
      step_chunks<Element::float32, Element::float16, 1>,   step_chunks<Element::float32, Element::float16, 2>,
      step_chunks<Element::float32, Element::float32, 1>,   step_chunks<Element::float32, Element::float32, 2>,
  };
  const int kind = single ? 8 : 4 * half + 2 * (state == Element::float32);
  return kChunks[kind + (a.num_predictions - 1)];
}

// Makes the step of a range by chunks, if it can be made so.
bool step_in_chunks(const StepArguments& a, const Row<float>& row, const PairWeights<float>& pair, int64_t sample,
                    int64_t begin, int64_t end) {
  const bool streams = streams_out(a);
  const StepChunks chunks = choose_chunks(a, streams);
  if (chunks == nullptr) return false;
  if (streams) {
    const int64_t bytes = element_bytes(a.out.element);
    const uintptr_t first =
        reinterpret_cast<uintptr_t>(a.out.data) + uintptr_t((sample * a.out.batch_stride + begin) * bytes);
    const int64_t ahead = int64_t(-first % 64) / bytes, aligned = begin + ahead < end ? begin + ahead : end;
    chunks(a, row, pair, sample, begin, aligned, false);
    begin = aligned;
  }
  chunks(a, row, pair, sample, begin, end, streams);
  if (streams) end_streams();
  return true;
}

// ---- The step of any tensors, in blocks ----

template <typename T>
const T* draw(const StepArguments& a, uint32_t step, const Block& block, T* z) {
  if constexpr (sizeof(T) == sizeof(float)) {
    portable_noise(a, block.sample, step, block.offset, block.count, z);
  } else {
    float values[kBlock];
    portable_noise(a, block.sample, step, block.offset, block.count, values);
    for (int64_t i = 0; i < block.count; ++i) z[i] = T(values[i]);
  }
  return z;
}

template <typename T>
Run<T> load_inputs(const StepArguments& a, const T* weights, uint32_t step, const Block& block, Scratch<T>& scratch) {
  Run<T> run = load_guided(a, weights, block, scratch);
  if (a.variance.data != nullptr) run.v = load_block(a.variance, block, scratch.v);
  switch (a.noise_kind) {
    case Noise::none:
    case Noise::torch_stream:  // the binding refuses it on the CPU
      break;
    case Noise::given:
      run.z = load_block(a.noise, block, scratch.z);
      break;
    case Noise::portable:
      run.z = draw(a, step, block, scratch.z);
      break;
  }
  run.out = place_of(a.out, block, scratch.out);
  if (a.history.data != nullptr) {
    run.original = scratch.original;
    copy_to(scratch.x, run.x, block.count);  // out may be the sample
    run.x = scratch.x;
  }
  if (a.original.data != nullptr) {
    run.original = place_of(a.original, block, scratch.original);
    if (run.z != nullptr && (run.z == run.out || run.z == run.original)) {  // x_0 gets its part of the noise last
      copy_to(scratch.z, run.z, block.count);
      run.z = scratch.z;
    }
  }
  return run;
}

// Adds what earlier steps have left, and leaves something for later ones: a second pass over a block that is at hand.
template <typename T>
void step_history(const StepArguments& a, const Row<T>& row, const Run<T>& run, const Block& block,
                  Scratch<T>& scratch) {
  const auto add = [&](T factor, const T* values) {
    for (int64_t i = 0; i < block.count; ++i) run.out[i] = fused(factor, values[i], run.out[i]);
  };
  if (a.anchor.data != nullptr && row.out_anchor != T(0))
    add(row.out_anchor, load_block(a.anchor, block, scratch.staged));
  T* entries = static_cast<T*>(a.history.data) + block.sample * a.history.batch_stride + block.offset;
  for (int slot = 0; slot < a.history_slots; ++slot) {
    const T factor = history_factor(row, slot);
    if (factor != T(0)) add(factor, entries + slot * a.batch * a.history.batch_stride);
  }
  if (!writes_history(row, a.history_slots)) return;
  T* entry = entries + int64_t(row.hist_slot) * a.batch * a.history.batch_stride;
  for (int64_t i = 0; i < block.count; ++i) entry[i] = history_entry(row, run.original[i], run.x[i]);
}

// Finishes the outputs that step_run has computed: the known part, the conversion, and the next model input.
template <typename T>
void write_outputs(const StepArguments& a, const Row<T>& row, const Run<T>& run, const Block& block,
                   Scratch<T>& scratch) {
  if (a.mask.data != nullptr) {
    const T *mask = load_block(a.mask, block, scratch.mask), *known = load_block(a.known, block, scratch.known);
    const T* z = load_block(a.known_noise, block, scratch.known_z);
    for (int64_t i = 0; i < block.count; ++i) run.out[i] = with_known(row, run.out[i], mask[i], known[i], z[i]);
  }
  if (run.out == scratch.out) store_block(run.out, a.out, block);
  if (a.original.data != nullptr) {
    if (run.z != nullptr && row.x0_noise != T(0)) {
      for (int64_t i = 0; i < block.count; ++i) run.original[i] = fused(row.x0_noise, run.z[i], run.original[i]);
    }
    if (run.original == scratch.original) store_block(run.original, a.original, block);
  }
  if (a.staged.data == nullptr) return;
  for (int64_t i = 0; i < block.count; ++i) scratch.staged[i] = row.in_scale * run.out[i];
  for (int copy = 0; copy < a.staged_copies; ++copy) {
    store_block(scratch.staged, a.staged, Block{copy * a.batch + block.sample, block.offset, block.count});
  }
}

// Whether the step is one pass over tensors that are all used in place: then all elements are one block.
template <typename T>
bool is_in_place(const StepArguments& a) {
  bool in_place = a.num_predictions <= 2 && a.noise_kind != Noise::portable && a.mask.data == nullptr &&
                  a.staged.data == nullptr && a.history.data == nullptr && a.anchor.data == nullptr &&
                  (a.noise.data == nullptr || a.original.data == nullptr);
  for_each_input(a, a.predictions, [&](Argument, const Input& input) {
    in_place = in_place && (input.data == nullptr || stored_as<T>(input.element));
  });
  for_each_output(a, [&](Argument, const Output& output, int) {
    in_place = in_place && (output.data == nullptr || stored_as<T>(output.element));
  });
  return in_place;
}

template <typename T>
void step_sample(const StepArguments& a, int64_t sample, int64_t begin, int64_t end) {
  const Position position = position_of(a, sample);
  if (!is_live(a, position)) return;
  const T* weights = weights_of<T>(a, sample, position.index);
  Row<T> row = weighed_row(a, weights, position.index);
  if (a.inverse_thresholds != nullptr) {
    row = with_threshold(row, static_cast<const T*>(a.inverse_thresholds)[sample * a.inverse_thresholds_stride]);
  }
  PairWeights<T> pair = pair_weights(weights, a.num_predictions);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (step_in_chunks(a, row, pair, sample, begin, end)) return;
  }
  if (is_history_alone<T>(a)) return step_history_alone(a, row, pair, sample, begin, end);
  if (a.num_predictions > 2) pair.sum = T(1);  // they are combined before the step
  const StepRun<T> step_run = choose_run<T>(a);
  const uint32_t step = uint32_t(position.index - position.first);
  const int64_t size = is_in_place<T>(a) ? end - begin : kBlock;
  Scratch<T> scratch;
  for (int64_t offset = begin; offset < end; offset += size) {
    const Block block{sample, offset, end - offset < size ? end - offset : size};
    const Run<T> run = load_inputs(a, weights, step, block, scratch);
    step_run(row, pair, run, block.count);
    step_history(a, row, run, block, scratch);
    write_outputs(a, row, run, block, scratch);
  }
}

void step_sample_in_precision(const StepArguments& a, int64_t sample, int64_t begin, int64_t end) {
  if constexpr (kHasDouble) {
    if (a.double_precision) return step_sample<double>(a, sample, begin, end);
  }
  step_sample<float>(a, sample, begin, end);
}

}  // namespace

void write_original(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, void* x0) {
  if constexpr (kHasDouble) {
    if (a.double_precision) return original_of_sample(a, sample, begin, count, static_cast<double*>(x0));
  }
  original_of_sample(a, sample, begin, count, static_cast<float*>(x0));
}

void step_range(const StepArguments& a, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t sample = begin / a.elements_per_sample;
    const int64_t first = begin - sample * a.elements_per_sample;
    const int64_t left = a.elements_per_sample - first;
    const int64_t last = first + (end - begin < left ? end - begin : left);
    step_sample_in_precision(a, sample, first, last);
    begin += last - first;
  }
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide

#include "kernels/cpu/runs.h"  // of what is above
#include "kernels/cpu/tally.h"
