// What torch's normal values on the CPU are made with, one set of functions for each instruction set. No torch.
//
// torch draws a word after the other, and each element waits for the last one; here, words are made a vector at a time.
// Without AVX2, torch computes in another way, and nothing here has its bits.
#pragma once

#include <cstdint>

#include "maths/torch_normal.h"

namespace fastguide {

constexpr int kNormals = 16;  // values that torch makes together, of as many words: 8 first ones of pairs, 8 others

// The engine of torch's generators: what is left of its words begins at `next`.
struct Twister {
  uint32_t words[kTwisterWords];
  int32_t next, left;
};

struct StreamFunctions {
  // Writes the next `count` uniform values; to: null, if they are only passed over.
  void (*uniforms)(Twister* engine, float* to, int64_t count);
  // Makes normal values of uniform ones, in their place: `count` times kNormals.
  void (*normals)(float* values, int64_t count);
};

#define FASTGUIDE_DECLARE(isa) \
  namespace isa { \
  void uniforms(Twister* engine, float* to, int64_t count); \
  void normals(float* values, int64_t count); \
  }

#if defined(__x86_64__)
FASTGUIDE_DECLARE(avx2)
FASTGUIDE_DECLARE(avx512)
#endif
#undef FASTGUIDE_DECLARE

}  // namespace fastguide
