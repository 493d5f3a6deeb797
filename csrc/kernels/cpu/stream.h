// How tensors that no cache would hold are read and written: fetched ahead of their use, and stored past the caches.
//
// A store to a line that no cache has reads the line first; one past the caches does not, and leaves their lines to
// what is read again. Host only.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/arguments.h"
#include "maths/inline.h"

namespace fastguide {

#if defined(__x86_64__)
constexpr bool kHasStreams = true;
#else
constexpr bool kHasStreams = false;
#endif

// The least bytes of an output that is written past the caches. A smaller one might be in them when it is read next.
constexpr int64_t kStreamed = int64_t{1} << 24;

// Whether a step writes its output past the caches. Where it is one of the inputs, its lines are there already. Samples
// that lie upon each other are no tensor's, but in memory of a thread's own, which it reads again at once.
FASTGUIDE_INLINE bool streams_out(const StepArguments& a) {
  if (!kHasStreams || a.batch * a.elements_per_sample * element_bytes(a.out.element) < kStreamed) return false;
  bool apart = a.out.batch_stride >= a.elements_per_sample;
  for_each_input(a, a.predictions, [&](Argument, const Input& input) { apart = apart && input.data != a.out.data; });
  return apart;
}

// Whether no cache holds the predictions: to fetch what is at hand would only take time.
FASTGUIDE_INLINE bool are_large(const StepArguments& a) {
  return a.batch * a.elements_per_sample * element_bytes(a.predictions[0].element) >= kStreamed / 2;
}

// Brings the line that is so many bytes behind an address into the caches. There may be nothing.
FASTGUIDE_INLINE void fetch(const void* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + uintptr_t(ahead)), 0, 3);
}

// Copies bytes past the caches, a multiple of 64 to a multiple of 64.
FASTGUIDE_INLINE void stream(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
    for (int64_t k = i; k < i + 64; k += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k)));
    }
#elif defined(__x86_64__)
    for (int64_t k = i; k < i + 64; k += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
    }
#endif
  }
}

// Makes what was stored past the caches visible to other threads, like any other store, with what they wait for.
FASTGUIDE_INLINE void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastguide
