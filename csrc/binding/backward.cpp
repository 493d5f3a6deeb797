// The operators fastguide::guided_step_backward and, for CPU tensors, fastguide::guided_step_clipped and
// fastguide::guided_step_squares: each part of a sample by itself, so that no bit depends on how parts are shared out
// among threads.
//
// fastguide/step/autograd.py and fastguide/step/log_probability.py call them, with arguments of a step that was
// checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "binding/capability.h"
#include "binding/operands.h"
#include "binding/run.h"
#include "binding/tensors.h"
#include "kernels/backward.h"
#include "kernels/cpu/backward.h"
#include "kernels/cpu/launch.h"
#include "kernels/cursor.h"
#include "kernels/gpu/backward.h"
#include "kernels/weights.h"

namespace fastguide {
namespace {

struct GradientOperands {
  explicit GradientOperands(StableIValue* stack) : next(stack) {}

  StableIValue* next;
#define FASTGUIDE_TAKE(type, name) type name = torch::stable::detail::to<type>(*next++);
  FASTGUIDE_GRADIENTS(FASTGUIDE_TAKE)
#undef FASTGUIDE_TAKE
};

#define FASTGUIDE_COUNT(type, name) +1
constexpr uint64_t kGradients = 0 FASTGUIDE_GRADIENTS(FASTGUIDE_COUNT);
#undef FASTGUIDE_COUNT

// Calls f(begin, end) for ranges of all parts of all samples, in parallel if that is worth it.
template <typename F>
void over_parts(const StepArguments& a, const F& f) {
  const int64_t count = a.batch * parts_of(a),
                grain = std::max<int64_t>(kGrain / std::min(kPart, a.elements_per_sample), 1);
  if (count <= grain) {
    f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// Adds up the numbers of each sample's parts, in order.
void add_parts(const std::vector<double>& parts, int64_t batch, int64_t parts_per_sample, int64_t columns, double* to) {
  for (int64_t sample = 0; sample < batch; ++sample) {
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0;
      for (int64_t part = 0; part < parts_per_sample; ++part) {
        sum += parts[static_cast<size_t>((sample * parts_per_sample + part) * columns + column)];
      }
      to[sample * columns + column] = sum;
    }
  }
}

double* numbers_of(const char* name, const Tensor& tensor, const Layout& layout, int64_t count) {
  check_device(name, tensor, layout);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == count, name,
                  ": expected ", count, " numbers of float64, contiguous");
  return static_cast<double*>(tensor.mutable_data_ptr());
}

uint8_t* clipped_of(const Tensor& tensor, const Layout& layout, const StepArguments& a) {
  check_device("clipped", tensor, layout);
  const int64_t count = a.batch * clipped_bytes(a);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous() && tensor.numel() == count,
                  "clipped: expected ", count, " numbers of uint8, contiguous");
  return static_cast<uint8_t*>(tensor.mutable_data_ptr());
}

// ---- Gradients ----

// Checks a tensor that holds the batch so many times.
int64_t check_copies(const char* name, const Tensor& tensor, const Layout& layout, int64_t copies) {
  const int64_t stride = check_layout(name, tensor, layout, copies * layout.batch);
  check_storage(name, tensor, layout);
  return stride;
}

Input optional_input(const char* name, const OptionalTensor& tensor, const Layout& layout, int64_t copies = 1) {
  if (!tensor.has_value()) return {};
  const int64_t stride = check_copies(name, *tensor, layout, copies);
  return {tensor->const_data_ptr(), stride, element_of(name, *tensor)};
}

Output optional_output(const char* name, const OptionalTensor& tensor, const Layout& layout, int64_t copies = 1) {
  if (!tensor.has_value()) return {};
  const int64_t stride = check_copies(name, *tensor, layout, copies);
  STD_TORCH_CHECK(copies * layout.batch <= 1 || stride >= layout.elements_per_sample, name,
                  ": expected samples that do not overlap");
  return {tensor->mutable_data_ptr(), stride, element_of(name, *tensor)};
}

void read_prediction_gradients(const TensorList& tensors, const StepArguments& a, const Layout& layout,
                               std::vector<Output>* outputs) {
  const char* name = "grad_predictions";
  if (tensors.empty()) return;
  const int64_t count = a.num_predictions;
  if (tensors.size() == 1 && count > 1) {
    const Output all = optional_output(name, tensors[0], layout, count);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t offset = k * layout.batch * all.batch_stride * element_bytes(all.element);
      outputs->push_back({static_cast<char*>(all.data) + offset, all.batch_stride, all.element});
    }
    return;
  }
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == count, name, ": expected ", count, ", got ", tensors.size());
  for (const Tensor& tensor : tensors) outputs->push_back(optional_output(name, tensor, layout));
}

BackwardArguments read_gradients(const GradientOperands& operands, const StepArguments& a, const Layout& layout,
                                 std::vector<Output>* predictions) {
  BackwardArguments b{};
  const OptionalTensor& any = operands.grad_left.has_value() ? operands.grad_left : operands.grad_history;
  b.slots = any.has_value() && layout.batch > 0 ? static_cast<int>(any->sizes()[0] / layout.batch) : 0;
  STD_TORCH_CHECK(b.slots <= kMaxSlots, "grad_history: expected at most ", kMaxSlots, " slots, got ", b.slots);
  b.grad_out = optional_input("grad_out", operands.grad_out, layout);
  b.grad_original = optional_input("grad_original", operands.grad_original, layout);
  b.grad_left = optional_input("grad_left", operands.grad_left, layout, b.slots);
  b.grad_sample = optional_output("grad_sample", operands.grad_sample, layout);
  b.grad_gradient = optional_output("grad_gradient", operands.grad_gradient, layout);
  b.grad_variance = optional_output("grad_variance", operands.grad_variance, layout);
  b.grad_noise = optional_output("grad_noise", operands.grad_noise, layout);
  b.grad_anchor = optional_output("grad_anchor", operands.grad_anchor, layout);
  b.grad_history = optional_output("grad_history", operands.grad_history, layout, b.slots);
  read_prediction_gradients(operands.grad_predictions, a, layout, predictions);
  b.grad_predictions = predictions->empty() ? nullptr : predictions->data();
  if (operands.grad_weights.has_value()) {
    const int64_t tiles = layout.is_cpu ? 1 : backward_tiles_of(a);
    b.grad_weights =
        numbers_of("grad_weights", *operands.grad_weights, layout, layout.batch * tiles * weight_columns(a));
  }
  if (operands.clipped.has_value()) {
    STD_TORCH_CHECK(layout.is_cpu, "clipped: expected none beside tensors on a GPU, got one");
    b.clipped = clipped_of(*operands.clipped, layout, a);
  }
  return b;
}

template <typename T>
void run_backward(const StepArguments& a, const BackwardArguments& b, const RunFunctions<T>& runs) {
  const int64_t parts = parts_of(a), columns = weight_columns(a);
  std::vector<double> sums(b.grad_weights == nullptr ? 0 : static_cast<size_t>(a.batch * parts * columns));
  over_parts(a, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k % parts * kPart, end = std::min(begin + kPart, a.elements_per_sample);
      Backward<T>(runs, a, b, k / parts, sums.empty() ? nullptr : sums.data() + k * columns).run(begin, end);
    }
  });
  if (b.grad_weights != nullptr) add_parts(sums, a.batch, parts, columns, b.grad_weights);
}

// The boxed function of fastguide::guided_step_backward. Of the step's arguments, `out` says the layout, and is not
// written.
void guided_step_backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs) {
  STD_TORCH_CHECK(num_arguments == kArguments + kGradients && num_outputs == 0, "guided_step_backward: expected ",
                  kArguments + kGradients, " arguments and no outputs, got ", num_arguments, " and ", num_outputs);
  const Operands operands(stack);
  const GradientOperands gradients(operands.next);
  const Layout layout = layout_of(operands.out);
  StepArguments a{};
  std::vector<Input> inputs;
  read(operands, layout, &inputs, &a);
  STD_TORCH_CHECK(a.cursor == nullptr && a.program == nullptr && a.noise_kind != Noise::torch_stream,
                  "guided_step_backward: expected no cursor, program or philox");
  std::vector<Output> predictions;
  const BackwardArguments b = read_gradients(gradients, a, layout, &predictions);
  STD_TORCH_CHECK(b.grad_variance.data == nullptr || a.noise_kind != Noise::portable,
                  "seeds: expected the values of the noise where a variance has a gradient");
  a.original = a.staged = a.history = {};
  check(a, layout.is_cpu);
  if (!layout.is_cpu) {
    if (!is_empty(layout)) run_backward_on_gpu(a, b, layout.device);
    return;
  }
  if (b.grad_weights != nullptr) std::fill_n(b.grad_weights, layout.batch * weight_columns(a), 0.0);
  if (is_empty(layout)) return;
  const StepFunctions functions = selected_functions(a.double_precision);
  if (a.double_precision) {
    run_backward(a, b, functions.double_runs());
  } else {
    run_backward(a, b, functions.float_runs());
  }
}

constexpr int64_t kAtHand = 4 * kBlock;  // elements that are still in the first-level cache when they are read again

// ---- Clips ----

// Makes the step, and writes where it clips x0: of some elements at a time, whose inputs are at hand for both.
template <typename T>
void run_clipped(const StepFunctions& functions, const RunFunctions<T>& runs, const StepArguments& a,
                 uint8_t* clipped) {
  const int64_t parts = parts_of(a), size = a.elements_per_sample;
  over_parts(a, [&](int64_t first, int64_t last) {
    alignas(64) T x0[kAtHand];
    for (int64_t k = first; k < last; ++k) {
      const int64_t sample = k / parts, whole = std::min((k % parts + 1) * kPart, size);
      const T clip = row_at<T>(a, position_of(a, sample).index).clip;
      uint8_t* bits = clipped + sample * clipped_bytes(a);
      for (int64_t begin = k % parts * kPart; begin < whole; begin += kAtHand) {
        const int64_t end = std::min(begin + kAtHand, whole);
        functions.write_original(a, sample, begin, end - begin, x0);
        for (int64_t i = begin; i < end; i += kBlock) {
          runs.write_clipped(x0 + (i - begin), clip, std::min(end - i, kBlock), bits + i / 8);
        }
        functions.step_range(a, sample * size + begin, sample * size + end);
      }
    }
  });
}

// The boxed function of fastguide::guided_step_clipped, which has one argument more than a step: where the bits go.
void guided_step_clipped(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs) {
  STD_TORCH_CHECK(num_arguments == kArguments + 1 && num_outputs == 0, "guided_step_clipped: expected ", kArguments + 1,
                  " arguments and no outputs, got ", num_arguments, " and ", num_outputs);
  const Operands operands(stack);
  const Tensor clipped = torch::stable::detail::to<Tensor>(stack[kArguments]);
  const Layout layout = layout_of(operands.out);
  StepArguments a{};
  std::vector<Input> inputs;
  read(operands, layout, &inputs, &a);
  STD_TORCH_CHECK(a.cursor == nullptr && a.program == nullptr && a.inverse_thresholds == nullptr && layout.is_cpu,
                  "guided_step_clipped: expected CPU tensors, and no cursor, program or thresholds");
  uint8_t* to = clipped_of(clipped, layout, a);
  check(a, true);
  if (is_empty(layout)) return;
  const StepFunctions functions = selected_functions(a.double_precision);
  if (a.double_precision) {
    run_clipped(functions, functions.double_runs(), a, to);
  } else {
    run_clipped(functions, functions.float_runs(), a, to);
  }
}

// ---- Squares ----

// Computes the elements begin <= i < end of a sample's next one without its noise, by the step itself, of a table of
// that row alone.
template <typename T>
void make_mean(const StepFunctions& functions, const StepArguments& a, int64_t sample, int64_t begin, int64_t end,
               bool writes_history, T* mean) {
  const Position position = position_of(a, sample);
  StepArguments m = a;
  Row<T> row = row_at<T>(a, position.index);
  if (!writes_history) row.hist_slot = T(-1);
  m.rows = &row;
  m.steps = 1;
  m.weights = static_cast<const T*>(a.weights) + position.index * a.weights_step_stride;
  m.weights_step_stride = 0;
  m.index = 0;
  m.indices = nullptr;
  m.noise_kind = Noise::none;
  m.noise = {};
  m.original = m.staged = {};
  // The step writes from element `begin` on; what lies before its memory is no pointer that arithmetic may make.
  const uintptr_t out = reinterpret_cast<uintptr_t>(mean) - static_cast<uintptr_t>(begin) * sizeof(T);
  m.out = {reinterpret_cast<void*>(out), 0, sizeof(T) == sizeof(float) ? Element::float32 : Element::float64};
  functions.step_range(m, sample * a.elements_per_sample + begin, sample * a.elements_per_sample + end);
}

// Whether a step is its mean and then the noise, to the bit, and writes nothing else.
bool ends_with_noise(const StepArguments& a) {
  return a.noise_kind == Noise::given && a.history.data == nullptr && a.anchor.data == nullptr &&
         a.original.data == nullptr && a.staged.data == nullptr;
}

template <typename T>
void add_noise(const RunFunctions<T>& runs, const StepArguments& a, int64_t sample, int64_t begin, int64_t end,
               const T* mean) {
  const T deviation = row_at<T>(a, position_of(a, sample).index).out_noise;
  const bool in_place = a.out.element == (sizeof(T) == sizeof(float) ? Element::float32 : Element::float64);
  T loaded[kBlock], next[kBlock];
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int64_t count = std::min(end - offset, kBlock);
    const T* z = runs.load(a.noise, sample, offset, count, loaded);
    T* to = in_place ? static_cast<T*>(a.out.data) + sample * a.out.batch_stride + offset : next;
    runs.sum_of_two(deviation, z, T(1), mean + (offset - begin), count, to);
    if (!in_place) runs.store(next, a.out, sample, offset, count);
  }
}

// Whether such a step is one of tensors that are all used in place, so that one pass makes the mean and x'.
template <typename T>
bool is_one_pass(const StepArguments& a) {
  constexpr Element own = sizeof(T) == sizeof(float) ? Element::float32 : Element::float64;
  bool one_pass = ends_with_noise(a) && a.gradient.data == nullptr && a.num_predictions >= 1 &&
                  a.num_predictions <= 2 && a.out.element == own && a.inverse_thresholds == nullptr;
  for_each_input(a, a.predictions, [&](Argument, const Input& input) {
    one_pass = one_pass && (input.data == nullptr || input.element == own);
  });
  return one_pass;
}

// Makes a part of such a step; returns the sum of (x' - mean)^2, in the order of squares_of.
template <typename T>
double make_and_add(const RunFunctions<T>& runs, const StepArguments& a, int64_t sample, int64_t begin, int64_t end) {
  const auto run_of = [&](const Input& input) {
    return static_cast<const T*>(input.data) + sample * input.batch_stride;
  };
  const int64_t index = position_of(a, sample).index;
  const T* weights = static_cast<const T*>(a.weights) + index * a.weights_step_stride + sample * a.weights_batch_stride;
  const PairWeights<T> pair = pair_weights(weights, a.num_predictions);
  const Row<T>& row = row_at<T>(a, index);
  const T *x = run_of(a.sample), *p0 = run_of(a.predictions[0]), *z = run_of(a.noise);
  const T* p1 = a.num_predictions > 1 ? run_of(a.predictions[1]) : nullptr;
  T* next = static_cast<T*>(a.out.data) + sample * a.out.batch_stride;
  alignas(64) T mean[kBlock];
  double total = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = std::min(end - i, kBlock);
    runs.noisy_step(row, pair, x + i, p0 + i, p1 == nullptr ? nullptr : p1 + i, z + i, count, mean, next + i);
    total += runs.sum_of_squares(next + i, mean, count);
  }
  return total;
}

// Sums up (x' - mean)^2 of each sample; makes x' in the same pass, where it is not there yet.
template <typename T>
void run_squares(const StepFunctions& functions, const RunFunctions<T>& runs, const StepArguments& a, bool makes_step,
                 double* squares) {
  const int64_t parts = parts_of(a), size = a.elements_per_sample;
  const bool one_pass = makes_step && is_one_pass<T>(a);
  std::vector<double> sums(static_cast<size_t>(a.batch * parts));
  over_parts(a, [&](int64_t first, int64_t last) {
    alignas(64) T mean[kAtHand];
    for (int64_t k = first; k < last; ++k) {
      const int64_t sample = k / parts, whole = std::min((k % parts + 1) * kPart, size);
      double sum = 0;
      for (int64_t begin = k % parts * kPart; begin < whole; begin += kAtHand) {
        const int64_t end = std::min(begin + kAtHand, whole);
        if (one_pass) {
          sum += make_and_add(runs, a, sample, begin, end);
          continue;
        }
        make_mean(functions, a, sample, begin, end, !makes_step, mean);
        if (makes_step && ends_with_noise(a)) {
          add_noise(runs, a, sample, begin, end, mean);
        } else if (makes_step) {
          functions.step_range(a, sample * size + begin, sample * size + end);
        }
        sum += squares_of(runs, as_input(a.out), sample, begin, end, mean);
      }
      sums[static_cast<size_t>(k)] = sum;
    }
  });
  add_parts(sums, a.batch, parts, 1, squares);
}

// The boxed function of fastguide::guided_step_squares, which has two arguments more than a step: whether to make it,
// or else to take `out` for what it made; and where the sums go.
void guided_step_squares(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs) {
  STD_TORCH_CHECK(num_arguments == kArguments + 2 && num_outputs == 0, "guided_step_squares: expected ", kArguments + 2,
                  " arguments and no outputs, got ", num_arguments, " and ", num_outputs);
  const Operands operands(stack);
  const bool makes_step = torch::stable::detail::to<bool>(stack[kArguments]);
  const Tensor squares = torch::stable::detail::to<Tensor>(stack[kArguments + 1]);
  const Layout layout = layout_of(operands.out);
  StepArguments a{};
  std::vector<Input> inputs;
  read(operands, layout, &inputs, &a);
  STD_TORCH_CHECK(a.cursor == nullptr && a.program == nullptr && a.mask.data == nullptr && a.variance.data == nullptr &&
                      layout.is_cpu,
                  "guided_step_squares: expected CPU tensors, and no cursor, program, mask or variance");
  double* to = numbers_of("squares", squares, layout, layout.batch);
  check(a, true);
  if (makes_step) {  // out is written before the inputs are read again
    for_each_input(a, a.predictions, [&](Argument name, const Input& input) {
      if (name == Argument::noise) return;  // of which the mean has nothing
      check_apart("out", a.out, a.batch, name_of(name), input, {a.batch, a.elements_per_sample});
    });
  }
  std::fill(to, to + layout.batch, 0.0);
  if (is_empty(layout)) return;
  const StepFunctions functions = selected_functions(a.double_precision);
  if (a.double_precision) {
    run_squares(functions, functions.double_runs(), a, makes_step, to);
  } else {
    run_squares(functions, functions.float_runs(), a, makes_step, to);
  }
}

}  // namespace
}  // namespace fastguide

// The types and names of the arguments that guided_step_backward has beside a step's, each followed by a comma.
extern "C" __attribute__((visibility("default"))) const char* fastguide_gradients() {
#define FASTGUIDE_NAME(type, name) #type " " #name ","
  return FASTGUIDE_GRADIENTS(FASTGUIDE_NAME);
#undef FASTGUIDE_NAME
}

// The elements of a sample whose part of the gradients of weights a GPU's kernel adds up.
extern "C" __attribute__((visibility("default"))) int fastguide_gradient_tile() { return fastguide::kBackwardTile; }

STABLE_TORCH_LIBRARY_IMPL(fastguide, CPU, m) {
  m.impl("guided_step_backward", &fastguide::guided_step_backward);
  m.impl("guided_step_clipped", &fastguide::guided_step_clipped);
  m.impl("guided_step_squares", &fastguide::guided_step_squares);
}

#if defined(FASTGUIDE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastguide, CUDA, m) { m.impl("guided_step_backward", &fastguide::guided_step_backward); }
#endif
