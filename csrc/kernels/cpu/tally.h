// What a threshold needs to know of a part of a sample: how many elements of |x0| are at most 1, and above the top, and
// those between. Part of step.cpp, and compiled with it for each instruction set.
//
// A magnitude's bits, taken as an integer, are ordered as the magnitudes are, and vectors of integers are compared
// without a thought for NaN.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels/cpu/launch.h"
#include "kernels/cpu/original.h"
#include "kernels/cpu/stream.h"
#include "kernels/thresholds.h"

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

FASTGUIDE_INLINE int32_t as_key(int32_t key) { return key; }
FASTGUIDE_INLINE int64_t as_key(int64_t key) { return key; }
FASTGUIDE_INLINE int32_t as_key(float value) { return key_of(value); }
FASTGUIDE_INLINE int64_t as_key(double value) { return key_of(value); }

// Appends the keys above `low` and at most `high`, of values or of keys; returns how many they are.
template <typename Key, typename Value>
int64_t append(const Value* values, int64_t count, Key low, Key high, Key* to) {
  int64_t found = 0, i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Key) == sizeof(int32_t)) {
    const __m512i sign = _mm512_set1_epi32(kMostKey<float>), above = _mm512_set1_epi32(low);
    const __m512i most = _mm512_set1_epi32(high);
    for (; i + 16 <= count; i += 16) {
      const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(values + i), sign);
      const __mmask16 chosen = _mm512_cmpgt_epi32_mask(keys, above) & _mm512_cmple_epi32_mask(keys, most);
      _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(chosen, keys));
      found += __builtin_popcount(chosen);
    }
  }
#endif
  for (; i < count; ++i) {
    const Key key = as_key(values[i]);
    to[found] = key;
    found += (key > low) & (key <= high);
  }
  return found;
}

template <typename T>
void tally(const T* x0, int64_t count, T top, Tally<T>* so_far, KeyOf<T>* between) {
  using Key = KeyOf<T>;
  const Key one = key_of(T(1)), highest = key_of(top);
  Key low = 0, high = 0, below = 0, above = so_far->above, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Key key = key_of(x0[i]);
    const Key is_low = -Key(key <= one), is_high = -Key(key > highest);  // masks of all bits: nothing branches
    const Key if_low = key & is_low, if_high = (key & is_high) | (kMostKey<T> & ~is_high);
    low -= is_low;
    high -= is_high;
    below = if_low > below ? if_low : below;
    above = if_high < above ? if_high : above;
    largest = key > largest ? key : largest;
  }
  so_far->between += append(x0, count, one, highest, between + so_far->between);
  so_far->low += low;
  so_far->high += high;
  so_far->below = below > so_far->below ? below : so_far->below;
  so_far->above = above;
  so_far->largest = largest > so_far->largest ? largest : so_far->largest;
}

#if defined(__AVX512F__)
// The same of whole vectors, one after the other.
struct VectorTally {
  __m512i highest, below, above, largest;
  int64_t low, count;
  int32_t *first, *end;  // of the keys between
};

VectorTally begun(float top, const Tally<float>& so_far, int32_t* between) {
  int32_t* first = between + so_far.between;
  return {_mm512_set1_epi32(key_of(top)),
          _mm512_set1_epi32(so_far.below),
          _mm512_set1_epi32(so_far.above),
          _mm512_set1_epi32(so_far.largest),
          0,
          0,
          first,
          first};
}

FASTGUIDE_INLINE void add_vector(const float* x0, VectorTally* t) {
  const __m512i sign = _mm512_set1_epi32(kMostKey<float>), one = _mm512_set1_epi32(key_of(1.0f));
  const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(x0), sign);
  const __mmask16 is_low = _mm512_cmple_epi32_mask(keys, one), is_high = _mm512_cmpgt_epi32_mask(keys, t->highest);
  const __mmask16 neither = _mm512_knot(_mm512_kor(is_low, is_high));
  t->below = _mm512_mask_max_epi32(t->below, is_low, t->below, keys);
  t->above = _mm512_mask_min_epi32(t->above, is_high, t->above, keys);
  t->largest = _mm512_mask_max_epi32(t->largest, 0xFFFF, t->largest, keys);
  _mm512_storeu_si512(t->end, _mm512_maskz_compress_epi32(neither, keys));
  t->end += __builtin_popcount(neither);
  t->low += __builtin_popcount(is_low);
  t->count += 16;
}

void end_tally(const VectorTally& t, Tally<float>* so_far) {
  const int64_t between = t.end - t.first;
  so_far->between += between;
  so_far->low += t.low;
  so_far->high += t.count - t.low - between;
  int32_t lanes[3][16];
  _mm512_storeu_si512(lanes[0], t.below);
  _mm512_storeu_si512(lanes[1], t.above);
  _mm512_storeu_si512(lanes[2], t.largest);
  for (int k = 0; k < 16; ++k) {
    if (lanes[0][k] > so_far->below) so_far->below = lanes[0][k];
    if (lanes[1][k] < so_far->above) so_far->above = lanes[1][k];
    if (lanes[2][k] > so_far->largest) so_far->largest = lanes[2][k];
  }
}

// Tallies x0 of the step that reads nothing but a sample and predictions of float, as it is made. Returns how many
// elements these were: whole chunks.
template <int predictions>
int64_t tally_chunks(const Row<float>& row, const PairWeights<float>& pair, const Run<float>& run, int64_t count,
                     bool fetches, Tally<float>* so_far, int32_t* between) {
  const Row<float> c = row;
  const PairWeights<float> w = pair;
  const float *x = run.x, *p0 = run.p0, *p1 = run.p1;
  VectorTally tallied = begun(c.clip, *so_far, between);
  const int64_t whole = count / kChunk * kChunk;
  for (int64_t i = 0; i < whole; i += kChunk) {
    if (fetches) {
      for (int64_t k = i; k < i + kChunk; k += 16) {
        fetch(x + k, kSampleAhead * sizeof(float));
        fetch(p0 + k, kPredictionsAhead * sizeof(float));
        if constexpr (predictions == 2) fetch(p1 + k, kPredictionsAhead * sizeof(float));
      }
    }
    alignas(64) float x0[kChunk];
    for (int64_t j = 0; j < kChunk; ++j) {
      const float m = predictions == 2 ? guided_prediction(w, p0[i + j], p1[i + j]) : w.sum * p0[i + j];
      x0[j] = unclipped_original<float, true, false>(c, x[i + j], m, 0);
    }
    for (int64_t j = 0; j < kChunk; j += 16) add_vector(x0 + j, &tallied);
  }
  end_tally(tallied, so_far);
  return whole;
}

// Whether x0 is made of nothing but a sample and predictions of float.
bool is_of_floats(const StepArguments& a) {
  bool floats = a.num_predictions >= 1 && a.num_predictions <= 2 && a.gradient.data == nullptr;
  for (int k = 0; k < a.num_predictions; ++k) floats = floats && stored_as<float>(a.predictions[k].element);
  return floats && stored_as<float>(a.sample.element);
}
#endif

template <typename T>
void tally_part(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, Tally<T>* so_far,
                KeyOf<T>* between) {
  const OriginalWeights<T> w = original_weights<T>(a, sample);
  Scratch<T> scratch;
  T x0[kBlock];
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_of_floats(a)) {
      const auto chunks = a.num_predictions == 2 ? tally_chunks<2> : tally_chunks<1>;
      const Run<float> run = load_guided(a, w.weights, Block{sample, begin, count}, scratch);
      done = chunks(w.row, w.pair, run, count, a.batch * a.elements_per_sample * int64_t(sizeof(float)) >= kStreamed,
                    so_far, between);
    }
  }
#endif
  for (; done < count; done += kBlock) {
    const Block block{sample, begin + done, count - done < kBlock ? count - done : kBlock};
    original_of_block(a, w, block, scratch, x0);
    tally(x0, block.count, w.row.clip, so_far, between);
  }
}

}  // namespace

void tally_float(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, Tally<float>* so_far,
                 int32_t* between) {
  tally_part(a, sample, begin, count, so_far, between);
}

// Double has this in every instruction set, as few are the steps of which a threshold is found in it.
void tally_double(const StepArguments& a, int64_t sample, int64_t begin, int64_t count, Tally<double>* so_far,
                  int64_t* between) {
#if defined(FASTGUIDE_WITHOUT_DOUBLE)
  baseline::tally_double(a, sample, begin, count, so_far, between);
#else
  tally_part(a, sample, begin, count, so_far, between);
#endif
}

int64_t append_keys(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to) {
  return append(keys, count, low, high, to);
}

int64_t append_wide_keys(const int64_t* keys, int64_t count, int64_t low, int64_t high, int64_t* to) {
  return append(keys, count, low, high, to);
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
