// The threshold of a sample's x0: the quantile of its magnitudes, limited to [1, clip]. Host and device, no torch.
//
// The quantile of n values in order, v_0 <= v_1 <= ..., lies at q (n - 1), between two of them, as torch.quantile has
// it. Only one between 1 and the top has to be found: above and below, the limits are the threshold.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "maths/inline.h"
#include "maths/step.h"

namespace fastguide {

// On a GPU: 1 over a sample's threshold, and what the search for it needs, which is 0 between two steps
// (gpu/thresholds.cu).
constexpr int kThresholdBins = 2048;
constexpr int kThresholdWords = kThresholdBins + 8;

// A magnitude as an integer of the same order; NaN is above infinity.
template <typename T>
struct KeyType;
template <>
struct KeyType<float> {
  using Key = int32_t;
};
template <>
struct KeyType<double> {
  using Key = int64_t;
};
template <typename T>
using KeyOf = typename KeyType<T>::Key;

template <typename T>
constexpr KeyOf<T> kMostKey = (KeyOf<T>(1) << (8 * sizeof(T) - 2)) - 1 + (KeyOf<T>(1) << (8 * sizeof(T) - 2));

template <typename T>
FASTGUIDE_INLINE KeyOf<T> key_of(T value) {
  KeyOf<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & kMostKey<T>;
}

template <typename T>
FASTGUIDE_INLINE T magnitude_of(KeyOf<T> key) {
  T value;
  std::memcpy(&value, &key, sizeof value);
  return value;
}

// Of the magnitudes seen so far.
template <typename T>
struct Tally {
  int64_t low = 0, high = 0, between = 0;   // how many are at most 1, above the top, and neither
  KeyOf<T> below = 0, above = kMostKey<T>;  // the largest that is at most 1, and the smallest above the top
  KeyOf<T> largest = 0;
};

// Where the quantile of so many values lies: weight of the way from one to the next.
template <typename T>
struct Rank {
  int64_t lower, upper;
  T weight;
};

template <typename T>
FASTGUIDE_INLINE Rank<T> rank_of(T quantile, int64_t count) {
  const T place = quantile * T(count - 1), lower = std::floor(place), upper = std::ceil(place);
  const int64_t last = count - 1;  // which rounding may go beyond
  return {int64_t(lower) < last ? int64_t(lower) : last, int64_t(upper) < last ? int64_t(upper) : last, place - lower};
}

// The threshold between two neighbours, by torch.lerp's formula; beside an infinite one, where that is NaN, the top.
template <typename T>
FASTGUIDE_INLINE T threshold_between(T lower, T upper, T weight, T top) {
  T value = lower;
  if (weight > T(0)) {
    const T far = upper - lower;
    value = weight < T(0.5) ? std::fma(weight, far, lower) : std::fma(weight - T(1), far, upper);
    if (std::isinf(upper)) value = top;
  }
  return value < T(1) ? T(1) : value > top ? top : value;
}

}  // namespace fastguide
