// A step as plain data, which is made again with other tensors of the same layouts, without torch's dispatcher.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/arguments.h"

namespace fastguide {

// The predictions follow it in memory.
struct Record {
  StepArguments arguments;
  int64_t prediction_bytes;  // from one prediction to the next, if one tensor holds them all; otherwise 0
  int32_t device;
  bool is_cpu;
};

static_assert(sizeof(Record) % sizeof(int64_t) == 0 && sizeof(Input) % sizeof(int64_t) == 0, "places count int64s");

inline void add_place(const char* name, size_t offset, std::string* places) {
  *places += std::string(name) + " " + std::to_string(offset / sizeof(int64_t)) + ",";
}

// Lists the places of what changes from call to call; "prediction" is the distance between two predictions.
inline std::string record_places() {
  std::string places;
  Record record{};
  const char* begin = reinterpret_cast<const char*>(&record);
  const auto add = [&](Argument name, const void* field) {
    add_place(name_of(name), static_cast<size_t>(static_cast<const char*>(field) - begin), &places);
  };
  for_each_output(record.arguments, [&](Argument name, const Output& output, int) { add(name, &output.data); });
  for_each_input(record.arguments, [&](Argument name, const Input& input) { add(name, &input.data); });
  add(Argument::index, &record.arguments.index);
  add(Argument::indices, &record.arguments.indices);
  add(Argument::seeds, &record.arguments.seeds);
  add(Argument::cursor, &record.arguments.cursor);
  add(Argument::timestep, &record.arguments.timestep);
  add_place(name_of(Argument::predictions), sizeof(Record), &places);
  add_place("prediction", sizeof(Input), &places);
  return places;
}

}  // namespace fastguide
