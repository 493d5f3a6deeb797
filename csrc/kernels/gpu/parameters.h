// Makes the kernel's parameters of a step's arguments: what is aligned, and how many tiles a launch has.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/gpu/thread.h"
#include "kernels/gpu/vector.h"
#include "maths/element.h"
#include "maths/inline.h"
#include "maths/philox.h"

namespace fastguide {

// Whether every sample begins at a multiple of 16 bytes; an absent tensor does.
FASTGUIDE_INLINE bool begins_aligned(const void* data, int64_t batch, int64_t batch_stride, Element element) {
  return reinterpret_cast<int64_t>(data) % 16 == 0 && (batch <= 1 || batch_stride * element_bytes(element) % 16 == 0);
}

FASTGUIDE_INLINE Launch make_launch(const StepArguments& a) {
  Launch launch{};
  launch.a = a;
  launch.a.predictions = nullptr;
  // Without noise and gradient, a learned variance has no effect, and is not read.
  if (a.noise_kind == Noise::none && a.gradient.data == nullptr) launch.a.variance = Input{};
  for (int k = 0; k < a.num_predictions; ++k) launch.predictions[k] = a.predictions[k];
  launch.per_sample =
      (a.indices != nullptr && a.indices_stride != 0) || a.cursor_stride != 0 || a.weights_batch_stride != 0;
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
  }
  int64_t tiles_per_sample = (size + kThreads - 1) / kThreads;
  if (a.noise_kind != Noise::torch_stream) {
    const int64_t vector_tiles = (size + kTile - 1) / kTile;
    tiles_per_sample = vector_tiles + (!launch.aligned || size % kVector != 0);
    launch.vector_tiles = uint32_t(vector_tiles);
  }
  launch.tiles_per_sample = uint32_t(tiles_per_sample);
  launch.tiles = a.batch * tiles_per_sample;
  if (a.noise_kind == Noise::torch_stream && torch_vectors_fit(launch)) {
    launch.tiles = (torch_units(a) + kThreads - 1) / kThreads;
  }
  return launch;
}

}  // namespace fastguide
