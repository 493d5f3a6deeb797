// What a threshold needs to know of a part of a sample: how many elements of |x0| are at most 1, and above the top, and
// those between. Compiled once for each instruction set.
//
// A magnitude's bits, taken as an integer, are ordered as the magnitudes are, and vectors of integers are compared
// without a thought for NaN.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels/cpu/launch.h"
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
// The same in one pass, of a multiple of 16.
void tally_vectors(const float* x0, int64_t count, float top, Tally<float>* so_far, int32_t* between) {
  const __m512i sign = _mm512_set1_epi32(kMostKey<float>), one = _mm512_set1_epi32(key_of(1.0f));
  const __m512i highest = _mm512_set1_epi32(key_of(top));
  __m512i below = _mm512_set1_epi32(so_far->below), above = _mm512_set1_epi32(so_far->above);
  __m512i largest = _mm512_set1_epi32(so_far->largest);
  int64_t low = 0, high = 0, found = so_far->between;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(x0 + i), sign);
    const __mmask16 is_low = _mm512_cmple_epi32_mask(keys, one), is_high = _mm512_cmpgt_epi32_mask(keys, highest);
    const __mmask16 neither = _mm512_knot(_mm512_kor(is_low, is_high));
    below = _mm512_mask_max_epi32(below, is_low, below, keys);
    above = _mm512_mask_min_epi32(above, is_high, above, keys);
    largest = _mm512_mask_max_epi32(largest, 0xFFFF, largest, keys);
    _mm512_storeu_si512(between + found, _mm512_maskz_compress_epi32(neither, keys));
    found += __builtin_popcount(neither);
    low += __builtin_popcount(is_low);
    high += __builtin_popcount(is_high);
  }
  so_far->low += low;
  so_far->high += high;
  so_far->between = found;
  int32_t lanes[3][16];
  _mm512_storeu_si512(lanes[0], below);
  _mm512_storeu_si512(lanes[1], above);
  _mm512_storeu_si512(lanes[2], largest);
  for (int k = 0; k < 16; ++k) {
    if (lanes[0][k] > so_far->below) so_far->below = lanes[0][k];
    if (lanes[1][k] < so_far->above) so_far->above = lanes[1][k];
    if (lanes[2][k] > so_far->largest) so_far->largest = lanes[2][k];
  }
}
#endif

}  // namespace

void tally_float(const float* x0, int64_t count, float top, Tally<float>* so_far, int32_t* between) {
#if defined(__AVX512F__)
  const int64_t whole = count / 16 * 16;
  tally_vectors(x0, whole, top, so_far, between);
  x0 += whole, count -= whole;
#endif
  tally(x0, count, top, so_far, between);
}

// Of double, of which there are few: these are compiled for every instruction set.
void tally_double(const double* x0, int64_t count, double top, Tally<double>* so_far, int64_t* between) {
  tally(x0, count, top, so_far, between);
}

int64_t append_keys(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to) {
  return append(keys, count, low, high, to);
}

int64_t append_wide_keys(const int64_t* keys, int64_t count, int64_t low, int64_t high, int64_t* to) {
  return append(keys, count, low, high, to);
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
