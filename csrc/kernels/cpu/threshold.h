// Finds the threshold of one sample's x0 on the CPU: what its parts tally, and the one value that they leave open. Host
// only.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/launch.h"
#include "kernels/thresholds.h"

namespace fastguide {

inline void tally(const StepFunctions& f, const StepArguments& a, int64_t sample, int64_t begin, int64_t count,
                  Tally<float>* so_far, int32_t* between) {
  f.tally_float(a, sample, begin, count, so_far, between);
}

inline void tally(const StepFunctions& f, const StepArguments& a, int64_t sample, int64_t begin, int64_t count,
                  Tally<double>* so_far, int64_t* between) {
  f.tally_double(a, sample, begin, count, so_far, between);
}

inline int64_t append(const StepFunctions& f, const int32_t* keys, int64_t count, int32_t low, int32_t high,
                      int32_t* to) {
  return f.append_keys(keys, count, low, high, to);
}

inline int64_t append(const StepFunctions& f, const int64_t* keys, int64_t count, int64_t low, int64_t high,
                      int64_t* to) {
  return f.append_wide_keys(keys, count, low, high, to);
}

// Adds what another range has tallied.
template <typename T>
void add_tally(const Tally<T>& other, Tally<T>* sum) {
  sum->low += other.low, sum->high += other.high, sum->between += other.between;
  sum->below = std::max(sum->below, other.below);
  sum->above = std::min(sum->above, other.above);
  sum->largest = std::max(sum->largest, other.largest);
}

// The values of two ranks that follow each other, or of the same one.
template <typename T>
struct Neighbours {
  T lower, upper;
};

// Finds the keys of ranks k and k + 1 among so many; the second is the largest where there are no more. The keys are
// all in (first, last], and these bounds are shared out among bins: only those in a bin with them are put in order.
template <typename T>
Neighbours<T> neighbours_of(const StepFunctions& f, const KeyOf<T>* keys, int64_t count, int64_t k, KeyOf<T> first,
                            KeyOf<T> last) {
  using Key = KeyOf<T>;
  constexpr int kBins = 2048;
  int shift = 0;
  while ((last - first - 1) >> shift >= kBins) ++shift;
  int32_t bins[kBins] = {};
  for (int64_t i = 0; i < count; ++i) ++bins[(keys[i] - first - 1) >> shift];
  int bin = 0;
  while (k >= bins[bin]) k -= bins[bin++];
  const Key low = first + (Key(bin) << shift);  // the bin's keys are above this
  const Key high = last - low < Key(1) << shift ? last : low + (Key(1) << shift);
  std::vector<Key> in_bin(static_cast<size_t>(bins[bin] + kMoreKeys));
  const auto end = in_bin.begin() + append(f, keys, count, low, high, in_bin.data()), at = in_bin.begin() + k;
  std::nth_element(in_bin.begin(), at, end);
  Key after = last;
  if (at + 1 < end) {
    after = *std::min_element(at + 1, end);
  } else {
    for (int64_t i = 0; i < count; ++i) after = keys[i] > high && keys[i] < after ? keys[i] : after;
  }
  return {magnitude_of<T>(*at), magnitude_of<T>(after)};
}

// Returns the threshold of `count` magnitudes. between: the keys that the tally counts as such, in any order.
template <typename T>
T threshold_of(const StepFunctions& f, T quantile, T top, int64_t count, const Tally<T>& tallied,
               const KeyOf<T>* between) {
  if (tallied.largest > key_of(T(INFINITY))) return T(NAN);
  const Rank<T> rank = rank_of(quantile, count);
  const int64_t first_above = count - tallied.high;
  if (rank.upper < tallied.low) return T(1);
  if (rank.lower >= first_above) return top;
  const int64_t from = std::max<int64_t>(rank.lower - tallied.low, 0);
  Neighbours<T> found{T(1), top};
  if (from < tallied.between) found = neighbours_of<T>(f, between, tallied.between, from, key_of(T(1)), key_of(top));
  if (rank.lower < tallied.low) found = {magnitude_of<T>(tallied.below), found.lower};
  if (rank.upper >= first_above) found.upper = magnitude_of<T>(tallied.above);
  return threshold_between(found.lower, rank.upper > rank.lower ? found.upper : found.lower, rank.weight, top);
}

}  // namespace fastguide
