// The step index of each sample on the device, so that one captured launch is right at every step of a loop.
//
// A cursor is a row of kCursorColumns int64: the step's index; the index at which the sample is finished and no longer
// changed; the index of its first step, from which the portable noise counts; and, in the first row, how many blocks of
// a GPU's kernel have read the cursor. Host and device, no torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "maths/inline.h"
#include "maths/step.h"

namespace fastguide {

constexpr int kCursorColumns = 4, kCursorReaders = 3;

struct Position {
  int64_t index, first, end;  // of a cursor; otherwise first and end are 0
};

// Whether the sample is not finished.
FASTGUIDE_INLINE bool is_live(const StepArguments& a, const Position& position) {
  return a.cursor == nullptr || position.index < position.end;
}

FASTGUIDE_INLINE Position position_of(const StepArguments& a, int64_t sample) {
  if (a.cursor == nullptr) return {a.indices != nullptr ? a.indices[sample * a.indices_stride] : a.index, 0, 0};
  const int64_t* cursor = a.cursor + sample * a.cursor_stride;
  return {cursor[0], cursor[2], cursor[1]};
}

FASTGUIDE_INLINE bool in_table(const StepArguments& a, const Position& position) {
  return position.index >= 0 && position.index < a.steps;
}

template <typename T>
FASTGUIDE_INLINE const Row<T>& row_at(const StepArguments& a, int64_t index) {
  return static_cast<const Row<T>*>(a.rows)[index];
}

// One column of a row, in the arithmetic's dtype. On a GPU that is float32: the code for double is not compiled there.
template <typename Column>
FASTGUIDE_INLINE auto column_at(const StepArguments& a, int64_t index, const Column& column) {
#if defined(__CUDA_ARCH__)
  return column(row_at<float>(a, index));
#else
  return a.double_precision ? column(row_at<double>(a, index)) : double(column(row_at<float>(a, index)));
#endif
}

FASTGUIDE_INLINE void write_timestep(const StepArguments& a, int64_t place, int64_t index) {
  const auto value = column_at(a, index, [](const auto& row) { return row.in_timestep; });
  switch (a.timestep_element) {
    case TimestepElement::int64:
      static_cast<int64_t*>(a.timestep)[place] = int64_t(value);
      return;
    case TimestepElement::float32:
      static_cast<float*>(a.timestep)[place] = float(value);
      return;
  }
  FASTGUIDE_UNREACHABLE();
}

// Advances all cursors and writes the timesteps of the next model call, after every reader has its position. Does one
// share of the work, of `shares`. common is the position of a cursor that all samples have in common.
FASTGUIDE_INLINE void advance(const StepArguments& a, const Position& common, int64_t share, int64_t shares) {
  if (a.cursor_stride == 0) {
    if (!is_live(a, common) || !in_table(a, common)) return;
    for (int64_t place = share; place < a.timestep_count; place += shares) write_timestep(a, place, common.index);
    if (share == 0) a.cursor[0] = common.index + 1;
    return;
  }
  for (int64_t sample = share; sample < a.batch; sample += shares) {
    const Position position = position_of(a, sample);
    if (!is_live(a, position) || !in_table(a, position)) continue;
    for (int64_t place = sample; place < a.timestep_count; place += a.batch) write_timestep(a, place, position.index);
    a.cursor[sample * a.cursor_stride] = position.index + 1;
  }
}

// Whether torch's stream advances: a finished sample draws nothing, nor does a step of a loop that adds no noise.
FASTGUIDE_INLINE bool draws_from(const StepArguments& a, const Position& position) {
  if (a.cursor == nullptr) return true;
  if (!is_live(a, position) || !in_table(a, position)) return false;
  return column_at(a, position.index, [](const auto& row) { return row.out_noise; }) != 0;
}

}  // namespace fastguide
