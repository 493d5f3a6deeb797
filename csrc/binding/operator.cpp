// The only file that knows torch: implements fastguide::guided_step for CPU and CUDA tensors on libtorch's stable ABI.
//
// fastguide/ops.py has checked the arguments and says what is wrong with them; the checks here keep a direct call of
// the operator from reading or writing memory that is not its own.
#if defined(FASTGUIDE_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif
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

#include "kernels/arguments.h"
#include "kernels/cpu/launch.h"
#include "kernels/cursor.h"
#include "maths/element.h"
#include "maths/step.h"
#if defined(FASTGUIDE_CUDA)
#include "kernels/gpu/launch.h"

// In libtorch_cuda, which torch for the CPU does not have: weak, so that one library loads with every torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastguide {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;            // elements per thread at least, as in torch's elementwise operators
constexpr int64_t kNoiseGrain = kGrain / 4;  // where noise is made as well, which takes several times as long

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

// Shape, inner strides and device that all tensors of one step share.
struct Layout {
  const int64_t *sizes, *strides;
  int64_t dim, batch, elements_per_sample;
  bool is_cpu;
  int32_t device;
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
  Layout layout{out.sizes().data(), out.strides().data(), out.dim(), 0, 1, out.is_cpu(), out.get_device_index()};
  STD_TORCH_CHECK(layout.dim > 0, "out: expected shape (batch, ...), got a tensor without dimensions");
  layout.batch = layout.sizes[0];
  for (int64_t d = 1; d < layout.dim; ++d) layout.elements_per_sample *= layout.sizes[d];
  STD_TORCH_CHECK(layout.elements_per_sample == 0 || dense_within_sample(layout),
                  "out: expected it dense within a sample");
  return layout;
}

void check_device(const char* name, const Tensor& tensor, const Layout& layout) {
  STD_TORCH_CHECK(tensor.is_cpu() == layout.is_cpu && (layout.is_cpu || tensor.get_device_index() == layout.device),
                  name, ": expected a tensor on the device of out");
}

// Returns the batch stride; `samples` is the expected first size.
int64_t check_layout(const char* name, const Tensor& tensor, const Layout& layout, int64_t samples) {
  check_device(name, tensor, layout);
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

// Where not even the same element may be shared: an output of so many samples, and any other tensor.
void check_apart(const char* output_name, const Output& output, int64_t samples, const char* name, const Input& other,
                 const Layout& layout) {
  if (output.data == nullptr || other.data == nullptr || layout.batch == 0) return;
  const int64_t begin = reinterpret_cast<int64_t>(output.data), other_begin = reinterpret_cast<int64_t>(other.data);
  const int64_t size = (samples - 1) * output.batch_stride + layout.elements_per_sample;
  const int64_t other_size = (layout.batch - 1) * other.batch_stride + layout.elements_per_sample;
  STD_TORCH_CHECK(begin + size * element_bytes(output.element) <= other_begin ||
                      other_begin + other_size * element_bytes(other.element) <= begin,
                  output_name, ": expected memory apart from ", name);
}

// Streams of noise count elements as a contiguous sample holds them; see StepArguments::channels.
int64_t counted_channels(const Layout& layout) {
  int64_t expected = 1;
  bool contiguous = true, channels_last = layout.dim > 2;
  for (int64_t d = layout.dim - 1; d > 0; --d) {
    contiguous = contiguous && (layout.sizes[d] <= 1 || layout.strides[d] == expected);
    expected *= layout.sizes[d];
  }
  if (contiguous) return 1;
  expected = channels_last ? layout.sizes[1] : 0;
  for (int64_t d = layout.dim - 1; d > 1; --d) {
    channels_last = channels_last && (layout.sizes[d] <= 1 || layout.strides[d] == expected);
    expected *= layout.sizes[d];
  }
  STD_TORCH_CHECK(channels_last && (layout.sizes[1] <= 1 || layout.strides[1] == 1),
                  "seeds, philox: expected a sample that is contiguous or channels_last");
  return layout.sizes[1];
}

// ---- The operator ----

// An int64 tensor of shape () or (batch,) on the step's device: its values, and 0 or their stride.
const int64_t* per_sample(const char* name, const Tensor& tensor, const Layout& layout, int64_t* stride) {
  check_device(name, tensor, layout);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long &&
                      (tensor.dim() == 0 || (tensor.dim() == 1 && tensor.sizes()[0] == layout.batch)),
                  name, ": expected int64 of shape () or (", layout.batch, ",)");
  *stride = tensor.dim() == 0 ? 0 : tensor.strides()[0];
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

TorchStream torch_stream_of(const Tensor& philox, int64_t threads, const Layout& layout) {
  STD_TORCH_CHECK(!layout.is_cpu, "philox: torch's CUDA stream is drawn on a GPU, and out is a CPU tensor");
  STD_TORCH_CHECK(threads > 0 && threads <= INT32_MAX, "philox_threads: expected more than 0, got ", threads);
  const int64_t values = philox.is_cpu() ? 2 : 3;
  STD_TORCH_CHECK(philox.scalar_type() == ScalarType::Long && philox.dim() == 1 && philox.sizes()[0] == values &&
                      philox.is_contiguous(),
                  "philox: expected int64: seed and offset on the CPU, or seed, offset and 0 on the device of out");
  TorchStream stream;
  stream.threads = static_cast<uint32_t>(threads);
  if (philox.is_cpu()) {
    const int64_t* state = static_cast<const int64_t*>(philox.const_data_ptr());
    stream.seed = static_cast<uint64_t>(state[0]);
    stream.offset = static_cast<uint64_t>(state[1]);
  } else {
    check_device("philox", philox, layout);
    stream.state = static_cast<int64_t*>(philox.mutable_data_ptr());
  }
  return stream;
}

void set_cursor(StepArguments* a, const Tensor& cursor, const std::optional<Tensor>& timestep, const Layout& layout) {
  check_device("cursor", cursor, layout);
  const int64_t rows = cursor.dim() == 2 ? cursor.sizes()[0] : 0;
  STD_TORCH_CHECK(cursor.scalar_type() == ScalarType::Long && (rows == 1 || rows == layout.batch) &&
                      cursor.sizes()[1] == kCursorColumns && cursor.is_contiguous(),
                  "cursor: expected int64 of shape (1 or ", layout.batch, ", ", kCursorColumns, "), contiguous");
  a->cursor = static_cast<int64_t*>(cursor.mutable_data_ptr());
  a->cursor_stride = rows == 1 ? 0 : kCursorColumns;
  a->indices = nullptr;
  if (!timestep.has_value()) return;
  check_device("timestep", *timestep, layout);
  const ScalarType type = timestep->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Float, "timestep: expected int64 or float32");
  a->timestep_count = timestep->numel();
  STD_TORCH_CHECK(timestep->dim() <= 1 && timestep->is_contiguous() &&
                      (a->cursor_stride == 0 || layout.batch == 0 || a->timestep_count % layout.batch == 0),
                  "timestep: expected shape () or (", layout.batch, " or a multiple,), contiguous");
  a->timestep = timestep->mutable_data_ptr();
  a->timestep_element = type == ScalarType::Long ? TimestepElement::int64 : TimestepElement::float32;
}

void run_on_cpu(const StepArguments& a) {
  const int64_t total = a.batch * a.elements_per_sample;
  const StepRange step_range = selected_step_range();
  const int64_t grain = a.noise_kind == Noise::portable ? kNoiseGrain : kGrain;
  if (total <= grain) {
    step_range(a, 0, total);
  } else {
    torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { step_range(a, begin, end); });
  }
  if (a.cursor != nullptr) advance(a, position_of(a, 0), 0, 1);
}

void run_on_gpu(const StepArguments& a, int32_t device) {
#if defined(FASTGUIDE_CUDA)
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "out: expected a CPU tensor, as this torch has no CUDA");
  STD_TORCH_CHECK(a.num_predictions <= cuda::max_predictions(), "predictions: expected at most ",
                  cuda::max_predictions(), " on a GPU, got ", a.num_predictions);
  STD_TORCH_CHECK(!a.double_precision, "sample: expected float32, bfloat16 or float16 on a GPU, got float64");
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "out: torch names no current stream on its device");
  const char* error = cuda::launch_step(a, device, stream);
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernel could not be started: ", error);
#else
  (void)a, (void)device;
  STD_TORCH_CHECK(false, "out: expected a CPU tensor, as fastguide was built without CUDA");
#endif
}

void guided_step(const Tensor& out, const std::optional<Tensor>& original, const std::optional<Tensor>& staged,
                 const Tensor& sample, const std::vector<Tensor>& predictions, const Tensor& rows,
                 const Tensor& weights, int64_t index, const std::optional<Tensor>& indices,
                 const std::optional<Tensor>& gradient, const std::optional<Tensor>& variance,
                 const std::optional<Tensor>& noise, const std::optional<Tensor>& seeds,
                 const std::optional<Tensor>& philox, int64_t philox_threads, const std::optional<Tensor>& cursor,
                 const std::optional<Tensor>& timestep, const std::optional<Tensor>& mask,
                 const std::optional<Tensor>& known, const std::optional<Tensor>& known_noise) {
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
  STD_TORCH_CHECK(mask.has_value() == known.has_value() && mask.has_value() == known_noise.has_value(),
                  "mask: expected mask, known and known_noise together");
  a.mask = input_of("mask", mask, layout);
  a.known = input_of("known", known, layout);
  a.known_noise = input_of("known_noise", known_noise, layout);

  STD_TORCH_CHECK(weights.dim() == 3, "weights: expected three dimensions");
  check_device("weights", weights, layout);
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

  check_device("rows", rows, layout);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.sizes()[1] == num_columns && rows.is_contiguous(),
                  "rows: expected shape (steps, ", int(num_columns), "), contiguous");
  a.steps = rows.sizes()[0];
  const Element arithmetic = element_of("rows", rows);
  STD_TORCH_CHECK(element_bytes(arithmetic) >= 4 && element_of("weights", weights) == arithmetic,
                  "rows, weights: expected both float32 or both float64");
  STD_TORCH_CHECK((weights.sizes()[0] == a.steps || weights.sizes()[0] == 1) &&
                      (weights.sizes()[1] == layout.batch || weights.sizes()[1] == 1) && weights.strides()[2] == 1,
                  "weights: expected shape (", a.steps, " or 1, ", layout.batch, " or 1, columns), dense columns");
  a.double_precision = arithmetic == Element::float64;
  a.rows = rows.const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.weights_step_stride = weights.sizes()[0] > 1 ? weights.strides()[0] : 0;
  a.weights_batch_stride = weights.sizes()[1] > 1 ? weights.strides()[1] : 0;

  a.index = index;
  if (indices.has_value()) a.indices = per_sample("index", *indices, layout, &a.indices_stride);
  if (cursor.has_value()) set_cursor(&a, *cursor, timestep, layout);
  STD_TORCH_CHECK(cursor.has_value() || !timestep.has_value(), "timestep: expected a cursor with it");
  STD_TORCH_CHECK(!cursor.has_value() || (a.out.data == a.sample.data && a.out.element == a.sample.element &&
                                          (layout.batch <= 1 || a.out.batch_stride == a.sample.batch_stride)),
                  "out: expected the sample itself with a cursor, as finished samples are left as they are");
  STD_TORCH_CHECK(!philox.has_value() || a.cursor_stride == 0,
                  "cursor: expected one for all samples with philox, which is one stream for all");
  // On a GPU nothing waits for indices: the kernel looks at them.
  const bool varied = a.indices_stride != 0 || a.cursor_stride != 0;
  const bool on_host = (a.indices == nullptr && a.cursor == nullptr) || layout.is_cpu;
  for (int64_t b = 0; on_host && b < (varied ? layout.batch : 1); ++b) {
    const Position position = position_of(a, b);
    STD_TORCH_CHECK(!position.live || in_table(a, position), "index: expected values from 0 to ", a.steps - 1, ", got ",
                    position.index);
  }

  STD_TORCH_CHECK(noise.has_value() + seeds.has_value() + philox.has_value() <= 1,
                  "noise: expected at most one of noise, seeds and philox");
  a.channels = 1;
  if (noise.has_value()) a.noise_kind = Noise::given;
  if (seeds.has_value()) {
    a.noise_kind = Noise::portable;
    a.seeds = per_sample("seeds", *seeds, layout, &a.seeds_stride);
    a.channels = counted_channels(layout);
  }
  if (philox.has_value()) {
    a.noise_kind = Noise::torch_stream;
    a.torch_stream = torch_stream_of(*philox, philox_threads, layout);
    a.channels = counted_channels(layout);
  }

  for (const Output* output : {&a.out, &a.original}) {
    check_overlap("sample", *output, a.sample, layout);
    for (const Input& prediction : inputs) check_overlap("predictions", *output, prediction, layout);
    check_overlap("gradient", *output, a.gradient, layout);
    check_overlap("variance", *output, a.variance, layout);
    check_overlap("noise", *output, a.noise, layout);
    for (const Input* input : {&a.mask, &a.known, &a.known_noise}) {  // they are read when the output is written
      check_apart("out", *output, layout.batch, "mask, known and known_noise", *input, layout);
    }
  }
  check_overlap("original", a.out, {a.original.data, a.original.batch_stride, a.original.element}, layout);
  STD_TORCH_CHECK(a.out.data != a.original.data || a.out.data == nullptr, "original: expected other memory than out's");

  if (staged.has_value()) {
    const int64_t samples = staged->dim() > 0 ? staged->sizes()[0] : 0;
    STD_TORCH_CHECK(layout.batch > 0 ? samples > 0 && samples % layout.batch == 0 : samples == 0,
                    "staged: expected a multiple of ", layout.batch, " samples, got ", samples);
    a.staged_copies = layout.batch > 0 ? static_cast<int>(samples / layout.batch) : 0;
    a.staged.batch_stride = check_layout("staged", *staged, layout, samples);
    STD_TORCH_CHECK(samples <= 1 || a.staged.batch_stride >= layout.elements_per_sample,
                    "staged: expected samples that do not overlap");
    a.staged.data = staged->mutable_data_ptr();
    a.staged.element = element_of("staged", *staged);
    // Its samples are written while others' inputs are still to be read.
    const auto check = [&](const char* name, const Input& other) {
      check_apart("staged", a.staged, samples, name, other, layout);
    };
    check("out", {a.out.data, a.out.batch_stride, a.out.element});
    check("original", {a.original.data, a.original.batch_stride, a.original.element});
    check("sample", a.sample);
    for (const Input& prediction : inputs) check("predictions", prediction);
    check("gradient", a.gradient);
    check("variance", a.variance);
    check("noise", a.noise);
    check("mask", a.mask);
    check("known", a.known);
    check("known_noise", a.known_noise);
  }

  if (layout.batch * layout.elements_per_sample == 0) return;
  if (!layout.is_cpu) {
    for (const Element element :
         {a.out.element, a.original.element, a.staged.element, a.sample.element, a.gradient.element, a.variance.element,
          a.noise.element, a.mask.element, a.known.element, a.known_noise.element}) {
      STD_TORCH_CHECK(element != Element::float64, "sample: expected no float64 tensors on a GPU");
    }
    for (const Input& prediction : inputs) {
      STD_TORCH_CHECK(prediction.element != Element::float64, "predictions: expected no float64 tensors on a GPU");
    }
    run_on_gpu(a, layout.device);
  } else {
    run_on_cpu(a);
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

// What the GPU kernels were compiled for, or "none: " and the reason.
extern "C" __attribute__((visibility("default"))) const char* fastguide_cuda_code() { return FASTGUIDE_CUDA_CODE; }

// Whether there is a driver that is too old for the CUDA runtime in this library.
extern "C" __attribute__((visibility("default"))) int fastguide_driver_too_old() {
#if defined(FASTGUIDE_CUDA)
  return fastguide::cuda::driver_too_old();
#else
  return 0;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fastguide, CPU, m) { m.impl("guided_step", TORCH_BOX(&fastguide::guided_step)); }

#if defined(FASTGUIDE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastguide, CUDA, m) { m.impl("guided_step", TORCH_BOX(&fastguide::guided_step)); }
#endif
