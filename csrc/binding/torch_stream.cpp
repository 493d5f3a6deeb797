// Draws normal values as torch.Tensor.normal_ does on the CPU, in parallel where there are many.
//
// A state's bytes are those that torch keeps in checkpoints (ATen/CPUGeneratorImpl.cpp), so that they stay what they
// are. fastguide/step/torch_normals.py compares values and states with torch's before anything is drawn here.
#include "binding/torch_stream.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "binding/capability.h"

namespace fastguide {
namespace {

constexpr int64_t kTogether = 32 * kNormals;   // values that fit the first-level cache
constexpr int64_t kPiece = int64_t{1} << 21;   // the same of the last level: one thread makes the words of all
constexpr int64_t kShared = int64_t{1} << 20;  // values from which on other threads are worth it
constexpr int64_t kShare = int64_t{1} << 16;   // the least for one of them

// The beginning of a state's bytes.
struct State {
  uint64_t seed;
  int32_t left;  // one more than the words that are left, but at most all
  int32_t seeded;
  uint64_t next;
  uint64_t words[kTwisterWords];  // of 32 bits
};

static_assert(sizeof(State) + 3 * sizeof(double) + 2 * sizeof(uint64_t) == kStateBytes, "and values that torch keeps");

void fill(const StreamFunctions& stream, Twister* engine, float* to, int64_t count) {
  const bool shared = count >= kShared && torch::stable::get_num_threads() > 1;
  const int64_t whole = count / kNormals * kNormals, step = shared ? kPiece : kTogether;
  for (int64_t begin = 0; begin < count; begin += step) {
    float* const here = to + begin;
    stream.uniforms(engine, here, std::min(step, count - begin));
    const int64_t made = std::min(step, whole - begin);
    if (made <= 0) break;
    if (shared) {
      torch::stable::parallel_for(0, made / kNormals, kShare / kNormals, [&](int64_t first, int64_t end) {
        stream.normals(here + first * kNormals, end - first);
      });
    } else {
      stream.normals(here, made / kNormals);
    }
  }
}

}  // namespace

bool draw_torch_stream(void* bytes, float* to, int64_t count) {
  StreamFunctions stream;
  State* const state = static_cast<State*>(bytes);
  const int64_t left = int64_t{state->left} - 1;
  const bool known = state->seeded == 1 && 0 <= left && left < kTwisterWords &&
                     (left == 0 || state->next <= uint64_t(kTwisterWords - left));
  if (count < kNormals || !known || !selected_stream(&stream)) return false;
  Twister engine;
  std::copy(state->words, state->words + kTwisterWords, engine.words);
  engine.next = static_cast<int32_t>(state->next);
  engine.left = static_cast<int32_t>(left);
  const bool rest = count % kNormals != 0;  // then the last ones are drawn again
  if (to == nullptr) {
    stream.uniforms(&engine, nullptr, count + (rest ? kNormals : 0));
  } else {
    fill(stream, &engine, to, count);
    if (rest) {
      stream.uniforms(&engine, to + count - kNormals, kNormals);
      stream.normals(to + count - kNormals, 1);
    }
  }
  std::copy(engine.words, engine.words + kTwisterWords, state->words);
  state->next = static_cast<uint64_t>(engine.next);
  state->left = engine.left + 1;
  return true;
}

}  // namespace fastguide
