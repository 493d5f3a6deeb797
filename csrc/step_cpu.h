// The CPU kernel's arguments and its entry points, one for each instruction set. No torch.
#pragma once

#include <cstdint>

namespace fastguide {

enum class Element : int { float32, bfloat16, float16, float64 };

// A tensor that is dense within a sample, all in the same order of elements; batch_stride counts elements.
struct Input {
  const void* data = nullptr;  // null: absent
  int64_t batch_stride = 0;
  Element element = Element::float32;
};

struct Output {
  void* data = nullptr;  // null: absent
  int64_t batch_stride = 0;
  Element element = Element::float32;
};

struct StepArguments {
  Output out, original;
  Input sample, gradient, variance, noise;
  const Input* predictions;
  int num_predictions;
  int64_t batch, elements_per_sample;
  bool double_precision;        // rows and weights, and the arithmetic, are double; otherwise float
  const void* rows;             // (steps, num_columns), contiguous
  const void* weights;          // (steps or 1, batch or 1, max(num_predictions, 1) + 1)
  int64_t weights_step_stride;  // 0: the same at every step
  int64_t weights_batch_stride;
  int64_t index;           // the row of every sample,
  const int64_t* indices;  // unless this gives one for all (stride 0) or one a sample (stride 1)
  int64_t indices_stride;
};

// Computes the elements begin <= i < end of all samples, counted one sample after the other.
using StepRange = void (*)(const StepArguments& arguments, int64_t begin, int64_t end);

namespace baseline {
void step_range(const StepArguments& arguments, int64_t begin, int64_t end);
}
#if defined(__x86_64__)
namespace avx2 {
void step_range(const StepArguments& arguments, int64_t begin, int64_t end);
}
namespace avx512 {
void step_range(const StepArguments& arguments, int64_t begin, int64_t end);
}
#endif

}  // namespace fastguide
