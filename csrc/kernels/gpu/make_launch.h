// Makes the kernel's parameters of a step's arguments: what is aligned, and how many tiles a launch has.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/parameters.h"
#include "kernels/gpu/tiles.h"
#include "maths/element.h"
#include "maths/inline.h"
#include "maths/philox.h"

namespace fastguide {

// Whether every sample begins at a multiple of 16 bytes; an absent tensor does.
FASTGUIDE_INLINE bool begins_aligned(const void* data, int64_t batch, int64_t batch_stride, Element element) {
  return reinterpret_cast<int64_t>(data) % 16 == 0 && (batch <= 1 || batch_stride * element_bytes(element) % 16 == 0);
}

// A launch of at most so many tiles has a vector a thread, so that more of the GPU takes part. The number is an
// assumption, of about what the largest GPUs run at once: it was not measured.
#if !defined(FASTGUIDE_FEW_TILES)  // the tests choose it
#define FASTGUIDE_FEW_TILES 1024
#endif

FASTGUIDE_INLINE void set_tiles(Launch& launch) {
  const StepArguments& a = launch.a;
  const int64_t size = a.elements_per_sample, single_tiles = (size + kTile - 1) / kTile;
  const int most = single_tiles > 1 ? most_vectors(a.num_predictions, extras_of(a)) : 1;
  launch.vectors = a.batch * single_tiles > FASTGUIDE_FEW_TILES ? most : 1;
  const int64_t vector_tiles = (single_tiles + launch.vectors - 1) / launch.vectors;
  const int64_t tiles_per_sample = vector_tiles + (!launch.aligned || size % kVector != 0);
  launch.vector_tiles = uint32_t(vector_tiles);
  launch.tiles_per_sample = divisor_of(uint32_t(tiles_per_sample));
  launch.tiles = a.batch * tiles_per_sample;
}

FASTGUIDE_INLINE void set_torch_tiles(Launch& launch) {
  const StepArguments& a = launch.a;
  const int64_t tiles_per_sample = (a.elements_per_sample + kThreads - 1) / kThreads;
  launch.vectors = 1;
  launch.tiles_per_sample = divisor_of(uint32_t(tiles_per_sample));
  launch.tiles = a.batch * tiles_per_sample;
  if (!torch_vectors_fit(launch)) return;
  launch.units_per_call = divisor_of(a.torch_stream.threads / kVector);
  launch.elements_per_sample = divisor_of(uint32_t(a.elements_per_sample));
  launch.tiles = (torch_units(a) + kThreads - 1) / kThreads;
}

FASTGUIDE_INLINE Launch make_launch(const StepArguments& a) {
  Launch launch{};
  launch.a = a;
  launch.a.predictions = nullptr;
  // Without noise and gradient, a learned variance has no effect, and is not read.
  if (a.noise_kind == Noise::none && a.gradient.data == nullptr) launch.a.variance = Input{};
  for (int k = 0; k < a.num_predictions; ++k) launch.predictions[k] = a.predictions[k];
  launch.per_sample = (a.indices != nullptr && a.indices_stride != 0) || a.cursor_stride != 0 ||
                      a.weights_batch_stride != 0 || a.inverse_thresholds != nullptr;
  launch.aligned = true;
  for_each_input(launch.a, launch.predictions, [&](Argument, const Input& input) {
    launch.aligned = launch.aligned && begins_aligned(input.data, a.batch, input.batch_stride, input.element);
  });
  for_each_output(launch.a, [&](Argument, const Output& output, int copies) {
    launch.aligned =
        launch.aligned && begins_aligned(output.data, a.batch * copies, output.batch_stride, output.element);
  });

  const int64_t size = a.elements_per_sample;
  if (a.noise_kind == Noise::torch_stream) {
    launch.a.torch_stream.increment = torch_increment(uint64_t(a.batch * size), a.torch_stream.threads);
    set_torch_tiles(launch);
  } else {
    set_tiles(launch);
  }
  return launch;
}

}  // namespace fastguide
