// The elements of a group that one thread has, read and written a vector at a time or one by one. Device only.
#pragma once

#include <cstdint>

#include "kernels/gpu/groups.h"
#include "kernels/gpu/vector.h"
#include "maths/inline.h"

namespace fastguide {
namespace cuda {

// A thread's part of its group.
struct Lane {
  int64_t sample, begin;  // of the group, whose elements are counted from there
  int group, lane;        // counted within the block, and within the group
  bool active;            // whether there is such a group
  bool aligned;           // whether it begins at 16 bytes in every tensor
};

static __device__ Lane lane_of(const GroupsLaunch& launch, int64_t sample, int64_t first, int thread) {
  Lane l;
  l.sample = sample;
  l.group = thread >> launch.lane_bits;
  l.lane = thread - (l.group << launch.lane_bits);
  l.active = l.group < launch.groups && first + l.group < launch.groups_of_sample;
  l.begin = (first + l.group) * launch.a.elements_per_sample;
  l.aligned = launch.aligned && ((sample * launch.stride + l.begin) & launch.within_bits) == 0;
  return l;
}

// A vector's elements, of which `count` are the group's.
struct Span {
  int place, count;
};

static __device__ bool is_vector(const Lane& l, const Span& span) { return l.aligned && span.count == kVector; }

// Takes the first of some values, and moves the others up. A loop of such turns needs no copy of its code for each
// element, and no index that would put the values into memory.
static __device__ float turned(float (&values)[kVector], float last) {
  const float first = values[0];
  FASTGUIDE_UNROLL
  for (int i = 1; i < kVector; ++i) values[i - 1] = values[i];
  values[kVector - 1] = last;
  return first;
}

static __device__ Raw load_group(const Lane& l, const Input& input, const Span& span) {
  return load_raw(input, l.sample, l.begin + span.place);
}

// One element, and 0 behind the group.
static __device__ float load_one(const Lane& l, const Input& input, const Span& span, int i) {
  return i < span.count ? value_of(load_bits(input, l.sample, l.begin + span.place + i), input.element) : 0.0f;
}

// Says that a tensor is in the device's memory, which is not known of an address that is in the block's.
template <typename Tensor>
static __device__ void assume_global(const Tensor& tensor) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(tensor.data));
#endif
}

static __device__ void load_values(const Lane& l, const Input& input, const Span& span, float (&values)[kVector]) {
  assume_global(input);
  if (is_vector(l, span)) return unpack(load_group(l, input, span), input.element, values);
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector; ++i) turned(values, load_one(l, input, span, i));
}

// sample: of the tensor, which may hold several batches.
static __device__ void store_values(const Lane& l, const Output& output, int64_t sample, const Span& span,
                                    float (&values)[kVector]) {
  assume_global(output);
  if (is_vector(l, span)) return store_vector(values, output, sample, l.begin + span.place);
  FASTGUIDE_ROLL
  for (int i = 0; i < kVector; ++i) {  // all of them, so that the values are in their places again
    const float value = turned(values, values[0]);
    if (i < span.count) store_one(value, output, sample, l.begin + span.place + i);
  }
}

}  // namespace cuda
}  // namespace fastguide
