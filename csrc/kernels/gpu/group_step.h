// The step of a group's elements, behind their guided prediction: the formulas of maths/step.h for what one launch
// serves (groups.h). Device only.
//
// What a row adds to the next sample is a list in the block's memory, and outputs are written in turn: one place of the
// code loads, and one stores. What is computed is the same in the same order as in thread.h.
#pragma once

#include <cstdint>

#include "kernels/cursor.h"
#include "kernels/gpu/group_elements.h"
#include "kernels/gpu/groups.h"
#include "kernels/gpu/thread.h"
#include "maths/inline.h"
#include "maths/step.h"

namespace fastguide {
namespace cuda {

// A tensor that is added to the next sample, and its coefficient.
struct Addend {
  Input tensor;
  float factor;
};

constexpr int kMostAddends = 2 + kMaxSlots;  // noise, anchor, history

// The row of a block's sample.
struct GroupRow {
  Row<float> c;
  Addend addends[kMostAddends];
  int count;    // of them
  Output slot;  // of the history, which gets what the step leaves there; absent where it leaves nothing
};

// A share of the row's columns for each thread.
static __device__ void copy_row(const StepArguments& a, const Position& position, int thread, GroupRow& row) {
  const float* from = reinterpret_cast<const float*>(&row_at<float>(a, position.index));
  if (thread < kRowColumns) reinterpret_cast<float*>(&row.c)[thread] = from[thread];
}

// Lists what the row adds, in one thread, once its columns are there. inside: whether the table has the row.
static __device__ void list_tensors(const StepArguments& a, bool inside, GroupRow& row) {
  if (!inside) row.c.x0_sample = row.c.out_sample = NAN;
  int count = 0;
  if (a.noise.data != nullptr) row.addends[count++] = {a.noise, row.c.out_noise};
  if (a.anchor.data != nullptr && row.c.out_anchor != 0.0f) row.addends[count++] = {a.anchor, row.c.out_anchor};
  FASTGUIDE_ROLL
  for (int slot = 0; slot < a.history_slots; ++slot) {
    const float factor = history_factor(row.c, slot);
    if (factor != 0.0f) row.addends[count++] = {slot_of(a, slot), factor};
  }
  row.count = count;
  row.slot = writes_history(row.c, a.history_slots) ? written_slot_of(a, int(row.c.hist_slot)) : Output{};
}

// Steps a vector: x is the sample; next has the guided prediction, and gets the next sample.
static __device__ void step_values(const Lane& l, const Span& span, const GroupRow& row, const float (&x)[kVector],
                                   float (&x0)[kVector], float (&next)[kVector]) {
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const float m = next[i];
    x0[i] = clipped(unclipped_original<float, true, false>(row.c, x[i], m, 0.0f), row.c.clip);
    next[i] = next_sample<float, true, false, false, false>(row.c, x0[i], x[i], m, 0.0f, 0.0f, 0.0f);
  }
  FASTGUIDE_ROLL
  for (int k = 0; k < row.count; ++k) {
    float values[kVector];
    load_values(l, row.addends[k].tensor, span, values);
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector; ++i) next[i] = fused(row.addends[k].factor, values[i], next[i]);
  }
}

// What is written, in this order: the history's entry, x0, the next sample or the guided prediction, and copies of the
// next model input.
enum Written : int { kEntry, kOriginal, kOut, kStaged };

static __device__ void write_values(const GroupsLaunch& launch, const Lane& l, const Span& span, const GroupRow& row,
                                    const float (&x)[kVector], const float (&x0)[kVector],
                                    const float (&next)[kVector]) {
  float values[kVector];
  FASTGUIDE_UNROLL
  for (int i = 0; i < kVector; ++i) values[i] = launch.steps ? history_entry(row.c, x0[i], x[i]) : next[i];
  const int first = launch.steps ? kEntry : kOut, last = launch.steps ? kStaged + launch.a.staged_copies : kStaged;
  FASTGUIDE_ROLL
  for (int k = first; k < last; ++k) {
    const int copy = k > kStaged ? k - kStaged : 0;
    Output to = launch.a.staged;
    if (k == kEntry) to = row.slot;
    if (k == kOriginal) to = launch.a.original;
    if (k == kOut) to = launch.written;
    if (to.data != nullptr) store_values(l, to, l.sample + copy * launch.a.batch, span, values);
    const float scale = k == kOut ? row.c.in_scale : 1.0f;
    FASTGUIDE_UNROLL
    for (int i = 0; i < kVector && k < kStaged; ++i) values[i] = k == kEntry ? x0[i] : scale * next[i];
  }
}

}  // namespace cuda
}  // namespace fastguide
