// The kernel's parameters, and what a kernel is compiled for. Host and device, no torch.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/vector.h"
#include "maths/inline.h"

namespace fastguide {

constexpr int kThreads = 128;
constexpr int kTile = kThreads * kVector;  // elements of a block whose threads have a vector each
constexpr int64_t kMaxTiles = 0x7FFFFFFF;
constexpr int kMaxVectors = 2;   // of a thread
constexpr int kTorchValues = 4;  // values of one Philox call, which torch gives to elements `threads` apart

// Divides numbers below 2^31 by a product with a rounded reciprocal, which is exact for them: Granlund & Montgomery
// 1994, "Division by invariant integers using multiplication", theorem 4.2.
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

FASTGUIDE_INLINE Divisor divisor_of(uint32_t divisor) {
  uint32_t bits = 0;
  while ((uint64_t(1) << bits) < divisor) ++bits;
  const uint64_t power = uint64_t(1) << (31 + bits);
  return {divisor, uint32_t((power + divisor - 1) / divisor), 31 + bits};
}

FASTGUIDE_INLINE uint32_t quotient(uint32_t number, const Divisor& by) {
  return uint32_t(uint64_t(number) * by.multiplier >> by.shift);
}

struct Launch {
  StepArguments a;  // its predictions are null: they are the next member
  Input predictions[kMaxPredictions];
  int64_t tiles;                // the launch is refused if they are more than kMaxTiles
  Divisor tiles_per_sample;     // with one more than vector_tiles if there may be single elements
  Divisor units_per_call;       // where torch's stream is drawn in vectors: see tiles.h
  Divisor elements_per_sample;  // likewise
  uint32_t vector_tiles;        // of a sample
  uint32_t vectors;             // of a thread, at most those of its variant
  bool aligned;                 // every sample of every tensor begins at a multiple of 16 bytes
  bool per_sample;              // samples differ in their row or weights
};

// What else than its sample, predictions and noise a step reads: nothing; a history and an anchor; others, which are a
// gradient, a learned variance and a mask; or any of these.
enum class Extras : int { none, history, others, any };

FASTGUIDE_INLINE constexpr bool has_others(Extras extras) { return extras == Extras::others || extras == Extras::any; }

// The most vectors of a thread. Two share what a thread does once; those of other kernels would need too many
// registers.
FASTGUIDE_INLINE constexpr int most_vectors(int predictions, Extras extras) {
  return (predictions == 1 || predictions == 2) && !has_others(extras) ? kMaxVectors : 1;
}

// Whether there is a kernel for torch's noise in vectors. Others would need too many registers.
FASTGUIDE_INLINE constexpr bool torch_vectors_compiled(int predictions, Extras extras) {
  return extras == Extras::none || extras == Extras::history ||
         (extras == Extras::others && (predictions == 1 || predictions == 2));
}

// What a kernel is compiled for. predictions: 1, 2, or 0 for a number known at run time, for which a history makes
// Extras::any. Kernels with others take Noise::given also for a step without noise. All but the plain kernels are
// compiled with both outputs, and look for them at run time: each kernel is code for every dtype.
template <int predictions_, Extras extras_, Noise noise_, bool original_, bool staged_>
struct Variant {
  static constexpr int predictions = predictions_;
  static constexpr bool extras = has_others(extras_);
  static constexpr bool history = extras_ == Extras::history || extras_ == Extras::any;
  static constexpr bool original = original_, staged = staged_;
  static constexpr bool looks_for_outputs = extras_ != Extras::none;
  static constexpr bool looks_for_noise = false;  // unless it is given
  static constexpr Noise noise = noise_;
  static constexpr bool draws = noise == Noise::torch_stream || noise == Noise::portable;
  static constexpr int vectors = most_vectors(predictions, extras_);
  static constexpr int width = kVector;  // of a vector
};

FASTGUIDE_INLINE Extras extras_of(const StepArguments& a) {
  const bool history = a.history.data != nullptr || a.anchor.data != nullptr;
  bool others = false;
  for_each_input(a, [&](Argument name, const Input& input) {
    const bool own = name == Argument::sample || name == Argument::noise || name == Argument::anchor;
    others = others || (!own && input.data != nullptr);
  });
  if (!history) return others ? Extras::others : Extras::none;
  return others || a.num_predictions < 1 || a.num_predictions > 2 ? Extras::any : Extras::history;
}

}  // namespace fastguide
