// Draws torch's own noise stream on the CPU: the bits of torch's kernel, many words at a time.
//
// Compiled once for each instruction set that has fused multiply-adds, like step.cpp.
#include "kernels/cpu/torch_stream.h"

#include <algorithm>
#include <cstring>

namespace fastguide {
namespace FASTGUIDE_ISA {
namespace {

// Makes the next words of the last ones. Each is of words that are at least a vector away, or not yet made anew.
void make_words(uint32_t* words) {
  constexpr int kCount = kTwisterWords, kMiddle = kTwisterMiddle;
  for (int k = 0; k < kCount - kMiddle; ++k) words[k] = words[k + kMiddle] ^ twist(words[k], words[k + 1]);
  for (int k = kCount - kMiddle; k < kCount - 1; ++k) {
    words[k] = words[k + kMiddle - kCount] ^ twist(words[k], words[k + 1]);
  }
  words[kCount - 1] = words[kMiddle - 1] ^ twist(words[kCount - 1], words[0]);
}

constexpr int kAtOnce = 32;  // groups of kNormals
constexpr int kPairs = kNormals / 2;

}  // namespace

void uniforms(Twister* engine, float* to, int64_t count) {
  while (count > 0) {
    if (engine->left == 0) {
      make_words(engine->words);
      engine->next = 0;
      engine->left = kTwisterWords;
    }
    const int taken = int(std::min<int64_t>(count, engine->left));
    if (to != nullptr) {
      const uint32_t* const words = engine->words + engine->next;
      for (int k = 0; k < taken; ++k) to[k] = torch_uniform(words[k]);
      to += taken;
    }
    engine->next += taken;
    engine->left -= taken;
    count -= taken;
  }
}

void normals(float* values, int64_t count) {
  float u[kAtOnce * kPairs], v[kAtOnce * kPairs];  // apart, for vectors that are longer than a group's half
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int groups = int(std::min<int64_t>(kAtOnce, count - first));
    float* const here = values + first * kNormals;
    for (int k = 0; k < groups; ++k) {
      std::memcpy(u + k * kPairs, here + k * kNormals, sizeof(float) * kPairs);
      std::memcpy(v + k * kPairs, here + k * kNormals + kPairs, sizeof(float) * kPairs);
    }
    for (int k = 0; k < groups * kPairs; ++k) {
      const Normal2 pair = torch_normal(u[k], v[k]);
      u[k] = pair.first;
      v[k] = pair.second;
    }
    for (int k = 0; k < groups; ++k) {
      std::memcpy(here + k * kNormals, u + k * kPairs, sizeof(float) * kPairs);
      std::memcpy(here + k * kNormals + kPairs, v + k * kPairs, sizeof(float) * kPairs);
    }
  }
}

}  // namespace FASTGUIDE_ISA
}  // namespace fastguide
