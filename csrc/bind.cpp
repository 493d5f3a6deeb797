// The only file that knows torch: implements fastguide::guided_step for CPU tensors on libtorch's stable ABI.
//
// fastguide/ops.py has checked the arguments and says what is wrong with them; the checks here keep a direct call of
// the operator from reading or writing memory that is not its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "step.h"
#include "step_cpu.h"

namespace fastguide {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements per thread at least, as in torch's elementwise operators

// ---- Instruction sets ----

enum class Capability : int { baseline, avx2, avx512 };

#if defined(__x86_64__)
bool has_half_conversions() {  // "f16c" is no name for __builtin_cpu_supports in older compilers
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // runs while the library is being loaded
  if (!__builtin_cpu_supports("fma") || !has_half_conversions()) return Capability::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Capability::avx512;
  }
  if (__builtin_cpu_supports("avx2")) return Capability::avx2;
#endif
  return Capability::baseline;
}

std::atomic<Capability> selected_capability{best_capability()};

StepRange selected_step_range() {
  switch (selected_capability.load(std::memory_order_relaxed)) {
#if defined(__x86_64__)
    case Capability::avx512:
      return avx512::step_range;
    case Capability::avx2:
      return avx2::step_range;
#endif
    default:
      return baseline::step_range;
  }
}

// ---- Tensors to pointers ----

Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    case ScalarType::Double:
      return Element::float64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
  }
}

int64_t element_bytes(Element element) { return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2; }

// Shape and inner strides that all tensors of one step share.
struct Layout {
  const int64_t *sizes, *strides;
  int64_t dim, batch, elements_per_sample;
};

bool dense_within_sample(const Layout& layout) {
  // Walks the dimensions from the innermost out: each must start where the one before ends.
  int64_t expected = 1, left = 0;
  for (int64_t d = 1; d < layout.dim; ++d) left += layout.sizes[d] > 1;
  while (left > 0) {
    bool found = false;
    for (int64_t d = 1; d < layout.dim && !found; ++d) {
      if (layout.sizes[d] > 1 && layout.strides[d] == expected) {
        expected *= layout.sizes[d];
        found = true;
        --left;
      }
    }
    if (!found) return false;
  }
  return true;
}

Layout layout_of(const Tensor& out) {
  Layout layout{out.sizes().data(), out.strides().data(), out.dim(), 0, 1};
  STD_TORCH_CHECK(layout.dim > 0, "out: expected shape (batch, ...), got a tensor without dimensions");
  layout.batch = layout.sizes[0];
  for (int64_t d = 1; d < layout.dim; ++d) layout.elements_per_sample *= layout.sizes[d];
  STD_TORCH_CHECK(layout.elements_per_sample == 0 || dense_within_sample(layout),
                  "out: expected it dense within a sample");
  return layout;
}

// Returns the batch stride; `samples` is the expected first size.
int64_t check_layout(const char* name, const Tensor& tensor, const Layout& layout, int64_t samples) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.dim() == layout.dim, name, ": expected ", layout.dim, " dimensions, got ", tensor.dim());
  const int64_t* sizes = tensor.sizes().data();
  const int64_t* strides = tensor.strides().data();
  STD_TORCH_CHECK(sizes[0] == samples, name, ": expected size ", samples, " in dimension 0, got ", sizes[0]);
  for (int64_t d = 1; d < layout.dim; ++d) {
    STD_TORCH_CHECK(sizes[d] == layout.sizes[d], name, ": expected size ", layout.sizes[d], " in dimension ", d,
                    ", got ", sizes[d]);
  }
  for (int64_t d = 1; d < layout.dim; ++d) {
    STD_TORCH_CHECK(sizes[d] <= 1 || strides[d] == layout.strides[d] || layout.elements_per_sample == 0, name,
                    ": expected out's layout within a sample");
  }
  return strides[0];
}

Input input_of(const char* name, const Tensor& tensor, const Layout& layout) {
  const int64_t batch_stride = check_layout(name, tensor, layout, layout.batch);
  return {tensor.const_data_ptr(), batch_stride, element_of(name, tensor)};
}

Input input_of(const char* name, const std::optional<Tensor>& tensor, const Layout& layout) {
  return tensor.has_value() ? input_of(name, *tensor, layout) : Input{};
}

Output output_of(const char* name, const Tensor& tensor, const Layout& layout) {
  const int64_t batch_stride = check_layout(name, tensor, layout, layout.batch);
  STD_TORCH_CHECK(layout.batch <= 1 || batch_stride >= layout.elements_per_sample, name,
                  ": expected samples that do not overlap");
  return {tensor.mutable_data_ptr(), batch_stride, element_of(name, tensor)};
}

// An output may be an input, element for element, or share no byte with it. Anything else would read what the step
// has already written.
void check_overlap(const char* name, const Output& out, const Input& input, const Layout& layout) {
  if (out.data == nullptr || input.data == nullptr) return;
  const int64_t out_bytes = element_bytes(out.element), input_bytes = element_bytes(input.element);
  const int64_t out_stride = layout.batch > 1 ? out.batch_stride * out_bytes : 0;
  const int64_t input_stride = layout.batch > 1 ? input.batch_stride * input_bytes : 0;
  const int64_t out_run = layout.elements_per_sample * out_bytes;
  const int64_t input_run = layout.elements_per_sample * input_bytes;
  const int64_t out_begin = reinterpret_cast<int64_t>(out.data);
  const int64_t input_begin = reinterpret_cast<int64_t>(input.data);
  const int64_t out_end = out_begin + (layout.batch - 1) * out_stride + out_run;
  const int64_t input_end = input_begin + (layout.batch - 1) * input_stride + input_run;
  if (out_end <= input_begin || input_end <= out_begin) return;
  bool fine = false;
  if (out_stride == input_stride) {
    if (out_begin == input_begin) {
      fine = out_bytes == input_bytes;
    } else if (out_stride > 0) {  // interleaved, as two channel groups of one tensor are
      const bool out_first = out_begin < input_begin;
      const int64_t distance = (out_first ? input_begin - out_begin : out_begin - input_begin) % out_stride;
      fine =
          distance >= (out_first ? out_run : input_run) && out_stride - distance >= (out_first ? input_run : out_run);
    }
  }
  STD_TORCH_CHECK(fine, "out: expected memory apart from ", name,
                  ", or the same element for element; got a part of it");
}

// ---- The operator ----

void guided_step(const Tensor& out, const std::optional<Tensor>& original, const Tensor& sample,
                 const std::vector<Tensor>& predictions, const Tensor& rows, const Tensor& weights, int64_t index,
                 const std::optional<Tensor>& indices, const std::optional<Tensor>& gradient,
                 const std::optional<Tensor>& variance, const std::optional<Tensor>& noise) {
  const Layout layout = layout_of(out);
  StepArguments a{};
  a.batch = layout.batch;
  a.elements_per_sample = layout.elements_per_sample;
  a.out = output_of("out", out, layout);
  if (original.has_value()) a.original = output_of("original", *original, layout);
  a.sample = input_of("sample", sample, layout);
  a.gradient = input_of("gradient", gradient, layout);
  a.variance = input_of("variance", variance, layout);
  a.noise = input_of("noise", noise, layout);

  STD_TORCH_CHECK(weights.dim() == 3 && weights.is_cpu(), "weights: expected three dimensions, on the CPU");
  const int64_t weight_columns = weights.sizes()[2];
  std::vector<Input> inputs;
  const int64_t together = weight_columns - 1;  // how many predictions one tensor may hold along its batch
  if (predictions.size() == 1 && together > 1) {
    const int64_t stride = check_layout("predictions", predictions[0], layout, together * layout.batch);
    const Element element = element_of("predictions", predictions[0]);
    const char* data = static_cast<const char*>(predictions[0].const_data_ptr());
    for (int64_t k = 0; k < together; ++k) {
      inputs.push_back({data + k * layout.batch * stride * element_bytes(element), stride, element});
    }
  } else {
    for (const Tensor& prediction : predictions) inputs.push_back(input_of("predictions", prediction, layout));
  }
  a.predictions = inputs.data();
  a.num_predictions = static_cast<int>(inputs.size());
  STD_TORCH_CHECK(weight_columns == std::max(a.num_predictions, 1) + 1, "weights: expected ",
                  std::max(a.num_predictions, 1) + 1, " columns for ", a.num_predictions, " predictions, got ",
                  weight_columns);

  STD_TORCH_CHECK(rows.dim() == 2 && rows.sizes()[1] == num_columns && rows.is_contiguous() && rows.is_cpu(),
                  "rows: expected shape (steps, ", int(num_columns), "), contiguous, on the CPU");
  const int64_t steps = rows.sizes()[0];
  const Element arithmetic = element_of("rows", rows);
  STD_TORCH_CHECK(element_bytes(arithmetic) >= 4 && element_of("weights", weights) == arithmetic,
                  "rows, weights: expected both float32 or both float64");
  STD_TORCH_CHECK((weights.sizes()[0] == steps || weights.sizes()[0] == 1) &&
                      (weights.sizes()[1] == layout.batch || weights.sizes()[1] == 1) && weights.strides()[2] == 1,
                  "weights: expected shape (", steps, " or 1, ", layout.batch, " or 1, columns), dense columns");
  a.double_precision = arithmetic == Element::float64;
  a.rows = rows.const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.weights_step_stride = weights.sizes()[0] > 1 ? weights.strides()[0] : 0;
  a.weights_batch_stride = weights.sizes()[1] > 1 ? weights.strides()[1] : 0;

  a.index = index;
  if (indices.has_value()) {
    STD_TORCH_CHECK(indices->is_cpu() && indices->scalar_type() == ScalarType::Long &&
                        (indices->dim() == 0 || (indices->dim() == 1 && indices->sizes()[0] == layout.batch)),
                    "index: expected int64 of shape () or (", layout.batch, ",), on the CPU");
    a.indices = static_cast<const int64_t*>(indices->const_data_ptr());
    a.indices_stride = indices->dim() == 0 ? 0 : indices->strides()[0];
  }
  const int64_t count = a.indices == nullptr || indices->dim() == 0 ? 1 : layout.batch;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t row = a.indices == nullptr ? index : a.indices[b * a.indices_stride];
    STD_TORCH_CHECK(row >= 0 && row < steps, "index: expected values from 0 to ", steps - 1, ", got ", row);
  }

  for (const Output* output : {&a.out, &a.original}) {
    check_overlap("sample", *output, a.sample, layout);
    for (const Input& prediction : inputs) check_overlap("predictions", *output, prediction, layout);
    check_overlap("gradient", *output, a.gradient, layout);
    check_overlap("variance", *output, a.variance, layout);
    check_overlap("noise", *output, a.noise, layout);
  }
  check_overlap("original", a.out, {a.original.data, a.original.batch_stride, a.original.element}, layout);
  STD_TORCH_CHECK(a.out.data != a.original.data || a.out.data == nullptr, "original: expected other memory than out's");

  const int64_t total = layout.batch * layout.elements_per_sample;
  if (total == 0) return;
  const StepRange step_range = selected_step_range();
  if (total <= kGrain) {
    step_range(a, 0, total);
  } else {
    torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) { step_range(a, begin, end); });
  }
}

}  // namespace
}  // namespace fastguide

// Chooses the instruction set (0 baseline, 1 AVX2, 2 AVX-512), at most what the processor has; returns the one in use.
// A negative level only asks.
extern "C" __attribute__((visibility("default"))) int fastguide_cpu_capability(int level) {
  using fastguide::Capability;
  if (level >= 0) {
    const int best = static_cast<int>(fastguide::best_capability());
    fastguide::selected_capability.store(static_cast<Capability>(std::min(level, best)), std::memory_order_relaxed);
  }
  return static_cast<int>(fastguide::selected_capability.load(std::memory_order_relaxed));
}

STABLE_TORCH_LIBRARY_IMPL(fastguide, CPU, m) { m.impl("guided_step", TORCH_BOX(&fastguide::guided_step)); }
