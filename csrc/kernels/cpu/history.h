// The step of a solver that goes on from earlier calls, in one pass over tensors that are all used in place.
//
// Part of step.cpp, and compiled with it for each instruction set. Steps that have more to do add the history to a
// block that is at hand: the operations are the same, and so are the bits.
#pragma once

#include "kernels/cpu/convert.h"
#include "kernels/cpu/launch.h"
#include "kernels/cpu/loops.h"
#include "maths/step.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

// A range of elements, as T; what is absent is null.
template <typename T>
struct HistoryRun {
  const T *x, *p0, *p1;
  T* out;
  int reads;  // of slots whose factor is not zero
  const T* entries[kMaxSlots];
  T factors[kMaxSlots];
  T* entry;  // what is left for later ones
};

template <typename T, int predictions, int reads, bool writes>
void step_history_run(const Row<T>& row, const PairWeights<T>& pair, const HistoryRun<T>& run, int64_t count) {
  const Row<T> c = row;  // copies, which no output can alias
  const PairWeights<T> w = pair;
  const HistoryRun<T> r = run;
  // An output may be one of the inputs, element for element: no iteration reads what another writes.
  FASTGUIDE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const T m = predictions == 2 ? guided_prediction(w, r.p0[i], r.p1[i]) : w.sum * r.p0[i];
    const T x = r.x[i], x0 = clipped(unclipped_original<T, true, false>(c, x, m, T(0)), c.clip);
    T next = next_sample<T, true, false, false, false>(c, x0, x, m, T(0), T(0), T(0));
    if constexpr (reads > 0) next = fused(r.factors[0], r.entries[0][i], next);
    if constexpr (reads > 1) next = fused(r.factors[1], r.entries[1][i], next);
    if constexpr (reads > 2) next = fused(r.factors[2], r.entries[2][i], next);
    if constexpr (writes) r.entry[i] = history_entry(c, x0, x);
    r.out[i] = next;
  }
}

template <typename T>
using StepHistoryRun = void (*)(const Row<T>&, const PairWeights<T>&, const HistoryRun<T>&, int64_t);

template <typename T, int predictions>
StepHistoryRun<T> choose_history_run(int reads, bool writes) {
  static constexpr StepHistoryRun<T> kRuns[2 * (kMaxSlots + 1)] = {
      step_history_run<T, predictions, 0, false>, step_history_run<T, predictions, 0, true>,
      step_history_run<T, predictions, 1, false>, step_history_run<T, predictions, 1, true>,
      step_history_run<T, predictions, 2, false>, step_history_run<T, predictions, 2, true>,
      step_history_run<T, predictions, 3, false>, step_history_run<T, predictions, 3, true>,
  };
  return kRuns[2 * reads + writes];
}

// Whether a step has its history, its sample and its predictions, all of T, and nothing else to do but to write the
// next model input.
template <typename T>
bool is_history_alone(const StepArguments& a) {
  bool alone =
      a.history.data != nullptr && a.noise_kind == Noise::none && a.num_predictions > 0 && a.num_predictions <= 2;
  for_each_input(a, a.predictions, [&](Argument name, const Input& input) {
    const bool used = name == Argument::sample || name == Argument::predictions;
    alone = alone && (used ? stored_as<T>(input.element) : input.data == nullptr);
  });
  for_each_output(a, [&](Argument name, const Output& output, int) {
    const bool used = name == Argument::out || name == Argument::history;
    alone = alone && (used ? stored_as<T>(output.element) : output.data == nullptr || name == Argument::staged);
  });
  return alone;
}

// Writes the next model input of a block whose step is made. A call, as conversions would be inlined often.
template <typename T>
__attribute__((noinline)) void stage_block(const StepArguments& a, T in_scale, const T* out, int64_t sample,
                                           int64_t begin, int64_t count) {
  alignas(64) T staged[kBlock];
  for (int64_t i = 0; i < count; ++i) staged[i] = in_scale * out[i];
  for (int copy = 0; copy < a.staged_copies; ++copy) {
    store(staged, a.staged, (copy * a.batch + sample) * a.staged.batch_stride + begin, count);
  }
}

// Moves a run on.
template <typename T>
void advance(HistoryRun<T>& run, int64_t count) {
  run.x += count, run.p0 += count, run.p1 += count, run.out += count;
  for (int slot = 0; slot < run.reads; ++slot) run.entries[slot] += count;
  if (run.entry != nullptr) run.entry += count;
}

// Makes the step of a part of a sample; `is_history_alone`.
template <typename T>
void step_history_alone(const StepArguments& a, const Row<T>& row, const PairWeights<T>& pair, int64_t sample,
                        int64_t begin, int64_t end) {
  const auto at = [&](const auto& tensor) {
    return static_cast<const T*>(tensor.data) + sample * tensor.batch_stride + begin;
  };
  HistoryRun<T> run{};
  run.x = at(a.sample);
  run.p0 = at(a.predictions[0]);
  run.p1 = at(a.predictions[a.num_predictions - 1]);
  run.out = const_cast<T*>(at(a.out));  // `at` says const of what the step writes, too
  T* const slots = const_cast<T*>(at(a.history));
  const int64_t slot_stride = a.batch * a.history.batch_stride;
  for (int slot = 0; slot < a.history_slots; ++slot) {
    const T factor = history_factor(row, slot);
    if (factor == T(0)) continue;  // it may hold anything
    run.entries[run.reads] = slots + slot * slot_stride;
    run.factors[run.reads++] = factor;
  }
  const bool writes = writes_history(row, a.history_slots);
  if (writes) run.entry = slots + int64_t(row.hist_slot) * slot_stride;
  const StepHistoryRun<T> step = a.num_predictions == 2 ? choose_history_run<T, 2>(run.reads, writes)
                                                        : choose_history_run<T, 1>(run.reads, writes);
  if (a.staged.data == nullptr) return step(row, pair, run, end - begin);
  for (int64_t count; begin < end; begin += count) {
    count = end - begin < kBlock ? end - begin : kBlock;
    step(row, pair, run, count);
    stage_block(a, row.in_scale, run.out, sample, begin, count);
    advance(run, count);
  }
}

}  // namespace
}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
