// Where each sample stands in its table, kept on the device, so that one launch is right at every step of a loop.
//
// A cursor is a row of kCursorColumns int64: the step's index; the index at which the sample is finished, and is left
// as it is from there on; the index of its first step, from which the portable noise counts; and, in the first row, how
// many blocks of a GPU's kernel have read theirs. Host and device, no torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "maths/inline.h"
#include "maths/step.h"

namespace fastguide {

constexpr int kCursorColumns = 4, kCursorReaders = 3;

struct Position {
  int64_t index, first;
  bool live;  // not finished
};

FASTGUIDE_INLINE Position position_of(const StepArguments& a, int64_t sample) {
  if (a.cursor == nullptr) return {a.indices != nullptr ? a.indices[sample * a.indices_stride] : a.index, 0, true};
  const int64_t* cursor = a.cursor + sample * a.cursor_stride;
  return {cursor[0], cursor[2], cursor[0] < cursor[1]};
}

FASTGUIDE_INLINE bool in_table(const StepArguments& a, const Position& position) {
  return position.index >= 0 && position.index < a.steps;
}

FASTGUIDE_INLINE double row_value(const StepArguments& a, int64_t index, int column) {
  const int64_t place = index * num_columns + column;
  return a.double_precision ? static_cast<const double*>(a.rows)[place] : static_cast<const float*>(a.rows)[place];
}

FASTGUIDE_INLINE void write_timestep(const StepArguments& a, int64_t place, int64_t index) {
  const double value = row_value(a, index, Column::in_timestep);
  if (a.timestep_element == TimestepElement::int64) {
    static_cast<int64_t*>(a.timestep)[place] = int64_t(value);
  } else {
    static_cast<float*>(a.timestep)[place] = float(value);
  }
}

// Moves all cursors on, and writes the timesteps of the next model call, once every reader has its position; a share
// of the work, of `shares`. common: the position of a cursor for all samples.
FASTGUIDE_INLINE void advance(const StepArguments& a, const Position& common, int64_t share, int64_t shares) {
  if (a.cursor_stride == 0) {
    if (!common.live || !in_table(a, common)) return;
    for (int64_t place = share; place < a.timestep_count; place += shares) write_timestep(a, place, common.index);
    if (share == 0) a.cursor[0] = common.index + 1;
    return;
  }
  for (int64_t sample = share; sample < a.batch; sample += shares) {
    const Position position = position_of(a, sample);
    if (!position.live || !in_table(a, position)) continue;
    for (int64_t place = sample; place < a.timestep_count; place += a.batch) write_timestep(a, place, position.index);
    a.cursor[sample * a.cursor_stride] = position.index + 1;
  }
}

// Whether torch's stream moves on: a finished sample draws nothing, nor does a step of a loop that adds no noise.
FASTGUIDE_INLINE bool draws_from(const StepArguments& a, const Position& position) {
  if (a.cursor == nullptr) return true;
  return position.live && in_table(a, position) && row_value(a, position.index, Column::out_noise) != 0.0;
}

}  // namespace fastguide
