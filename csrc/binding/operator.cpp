// The operator fastguide::guided_step for CPU and CUDA tensors, on libtorch's stable ABI: reads its arguments and runs
// it.
//
// fastguide/step/checks.py has checked the arguments and explains what is wrong with them. The checks here keep a
// direct call of the operator from reading or writing memory that is not its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "binding/operands.h"
#include "binding/record.h"
#include "binding/run.h"
#include "binding/tensors.h"
#include "kernels/arguments.h"
#include "kernels/cursor.h"
#include "kernels/gpu/groups.h"
#include "kernels/gpu/moments.h"
#include "kernels/thresholds.h"
#include "kernels/weights.h"
#include "maths/element.h"
#include "maths/program.h"
#include "maths/step.h"

namespace fastguide {
namespace {

const Tensor* present(const Tensor& tensor) { return &tensor; }
const Tensor* present(const OptionalTensor& tensor) { return tensor.has_value() ? &*tensor : nullptr; }
const Tensor* present(const TensorList&) { return nullptr; }
const Tensor* present(Integer) { return nullptr; }

// Returns the argument if it is one tensor and present; otherwise null.
const Tensor* tensor_of(const Operands& operands, Argument argument) {
  switch (argument) {
#define FASTGUIDE_CASE(type, name) \
  case Argument::name: \
    return present(operands.name);
    FASTGUIDE_ARGUMENTS(FASTGUIDE_CASE)
#undef FASTGUIDE_CASE
  }
  FASTGUIDE_UNREACHABLE();
}

// ---- From operands to the kernels' arguments ----

void read_tensors(const Operands& operands, const Layout& layout, StepArguments* a) {
  a->batch = layout.batch;
  a->elements_per_sample = layout.elements_per_sample;
  for_each_output(*a, [&](Argument name, Output& output, int) {
    const bool repeats = name == Argument::staged || name == Argument::history;  // see read_copies
    const Tensor* tensor = repeats ? nullptr : tensor_of(operands, name);
    if (tensor != nullptr) output = output_of(name_of(name), *tensor, layout);
  });
  for_each_input(*a, [&](Argument name, Input& input) {
    const Tensor* tensor = tensor_of(operands, name);
    if (tensor != nullptr) input = input_of(name_of(name), *tensor, layout);
  });
  const bool masked = operands.mask.has_value();
  STD_TORCH_CHECK(masked == operands.known.has_value() && masked == operands.known_noise.has_value(),
                  "mask: expected mask, known and known_noise together");
}

// Reads one tensor a prediction, or one tensor that holds `stacked` of them along its batch.
void read_predictions(const TensorList& tensors, int64_t stacked, const Layout& layout, std::vector<Input>* inputs,
                      StepArguments* a) {
  const char* name = name_of(Argument::predictions);
  if (tensors.size() == 1 && stacked > 1) {
    const int64_t stride = check_layout(name, tensors[0], layout, stacked * layout.batch);
    const Element element = element_of(name, tensors[0]);
    const char* data = static_cast<const char*>(tensors[0].const_data_ptr());
    check_storage(name, tensors[0], layout);
    for (int64_t k = 0; k < stacked; ++k) {
      inputs->push_back({data + k * layout.batch * stride * element_bytes(element), stride, element});
    }
  } else {
    for (const Tensor& tensor : tensors) inputs->push_back(input_of(name, tensor, layout));
  }
  a->predictions = inputs->data();
  a->num_predictions = static_cast<int>(inputs->size());
}

void read_rows(const Tensor& rows, const Layout& layout, StepArguments* a) {
  check_device("rows", rows, layout);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.sizes()[1] == kRowColumns && rows.is_contiguous(),
                  "rows: expected shape (steps, ", kRowColumns, "), contiguous");
  const Element arithmetic = element_of("rows", rows);
  STD_TORCH_CHECK(arithmetic == Element::float32 || arithmetic == Element::float64,
                  "rows, weights: expected both float32 or both float64");
  a->double_precision = arithmetic == Element::float64;
  a->steps = rows.sizes()[0];
  a->rows = rows.const_data_ptr();
}

void read_weights(const Tensor& weights, const Layout& layout, StepArguments* a) {
  check_device("weights", weights, layout);
  const int64_t columns = std::max(a->num_predictions, 1) + 1;
  STD_TORCH_CHECK(weights.sizes()[2] == columns, "weights: expected ", columns, " columns for ", a->num_predictions,
                  " predictions, got ", weights.sizes()[2]);
  STD_TORCH_CHECK(element_of("weights", weights) == (a->double_precision ? Element::float64 : Element::float32),
                  "rows, weights: expected both float32 or both float64");
  STD_TORCH_CHECK((weights.sizes()[0] == a->steps || weights.sizes()[0] == 1) &&
                      (weights.sizes()[1] == layout.batch || weights.sizes()[1] == 1) && weights.strides()[2] == 1,
                  "weights: expected shape (", a->steps, " or 1, ", layout.batch, " or 1, columns), dense columns");
  a->weights = weights.const_data_ptr();
  a->weights_step_stride = weights.sizes()[0] > 1 ? weights.strides()[0] : 0;
  a->weights_batch_stride = weights.sizes()[1] > 1 ? weights.strides()[1] : 0;
}

void read_timestep(const Tensor& timestep, const Layout& layout, StepArguments* a) {
  check_device("timestep", timestep, layout);
  const ScalarType type = timestep.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Float, "timestep: expected int64 or float32");
  a->timestep_count = timestep.numel();
  STD_TORCH_CHECK(timestep.dim() <= 1 && timestep.is_contiguous() &&
                      (a->cursor_stride == 0 || layout.batch == 0 || a->timestep_count % layout.batch == 0),
                  "timestep: expected shape () or (", layout.batch, " or a multiple,), contiguous");
  a->timestep = timestep.mutable_data_ptr();
  a->timestep_element = type == ScalarType::Long ? TimestepElement::int64 : TimestepElement::float32;
}

void read_cursor(const Tensor& cursor, const Layout& layout, StepArguments* a) {
  check_device("cursor", cursor, layout);
  const int64_t rows = cursor.dim() == 2 ? cursor.sizes()[0] : 0;
  STD_TORCH_CHECK(cursor.scalar_type() == ScalarType::Long && (rows == 1 || rows == layout.batch) &&
                      cursor.sizes()[1] == kCursorColumns && cursor.is_contiguous(),
                  "cursor: expected int64 of shape (1 or ", layout.batch, ", ", kCursorColumns, "), contiguous");
  STD_TORCH_CHECK(a->out.data == a->sample.data && a->out.element == a->sample.element &&
                      (layout.batch <= 1 || a->out.batch_stride == a->sample.batch_stride),
                  "out: expected the sample itself with a cursor, as finished samples are "
                  "left as they are");
  a->cursor = static_cast<int64_t*>(cursor.mutable_data_ptr());
  a->cursor_stride = rows == 1 ? 0 : kCursorColumns;
}

// Reads where each sample is in the table: the cursor, otherwise the indices, otherwise the index.
void read_position(const Operands& operands, const Layout& layout, StepArguments* a) {
  a->index = operands.index;
  if (operands.cursor.has_value()) {
    read_cursor(*operands.cursor, layout, a);
  } else if (operands.indices.has_value()) {
    a->indices = per_sample("index", *operands.indices, layout, &a->indices_stride);
  }
  if (operands.timestep.has_value()) {
    STD_TORCH_CHECK(operands.cursor.has_value(), "timestep: expected a cursor with it");
    read_timestep(*operands.timestep, layout, a);
  }
}

TorchStream torch_stream_of(const Tensor& philox, int64_t threads, const Layout& layout) {
  STD_TORCH_CHECK(!layout.is_cpu, "philox: torch's CUDA stream is drawn on a GPU, and out is a CPU tensor");
  STD_TORCH_CHECK(threads > 0 && threads <= INT32_MAX, "philox_threads: expected more than 0, got ", threads);
  const int64_t values = philox.is_cpu() ? 2 : 3;
  STD_TORCH_CHECK(philox.scalar_type() == ScalarType::Long && philox.dim() == 1 && philox.sizes()[0] == values &&
                      philox.is_contiguous(),
                  "philox: expected int64: seed and offset on the CPU, or "
                  "seed, offset and 0 on the device of out");
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

void read_noise(const Operands& operands, const Layout& layout, StepArguments* a) {
  const bool given = operands.noise.has_value(), seeds = operands.seeds.has_value();
  const bool philox = operands.philox.has_value();
  STD_TORCH_CHECK(given + seeds + philox <= 1, "noise: expected at most one of noise, seeds and philox");
  STD_TORCH_CHECK(!philox || a->cursor_stride == 0,
                  "cursor: expected one for all samples with philox, which is "
                  "one stream for all");
  a->channels = seeds || philox ? counted_channels(layout) : 1;
  if (given) a->noise_kind = Noise::given;
  if (seeds) {
    a->noise_kind = Noise::portable;
    a->seeds = per_sample("seeds", *operands.seeds, layout, &a->seeds_stride);
  }
  if (philox) {
    a->noise_kind = Noise::torch_stream;
    a->torch_stream = torch_stream_of(*operands.philox, operands.philox_threads, layout);
  }
}

// Reads a tensor that holds the batch several times, and returns how often.
int read_copies(const char* name, const Tensor& tensor, const Layout& layout, Output* output) {
  const int64_t samples = tensor.dim() > 0 ? tensor.sizes()[0] : 0;
  STD_TORCH_CHECK(layout.batch > 0 ? samples > 0 && samples % layout.batch == 0 : samples == 0, name,
                  ": expected a multiple of ", layout.batch, " samples, got ", samples);
  output->batch_stride = check_layout(name, tensor, layout, samples);
  STD_TORCH_CHECK(samples <= 1 || output->batch_stride >= layout.elements_per_sample, name,
                  ": expected samples that do not overlap");
  output->data = tensor.mutable_data_ptr();
  check_storage(name, tensor, layout);
  output->element = element_of(name, tensor);
  return layout.batch > 0 ? static_cast<int>(samples / layout.batch) : 0;
}

void read_history(const Tensor& history, const Layout& layout, StepArguments* a) {
  a->history_slots = read_copies("history", history, layout, &a->history);
  STD_TORCH_CHECK(a->history_slots <= kMaxSlots, "history: expected at most ", kMaxSlots, " slots, got ",
                  a->history_slots);
  STD_TORCH_CHECK(a->history.element == (a->double_precision ? Element::float64 : Element::float32),
                  "history: expected the dtype of rows");
}

// Reads the program that makes the weights, and checks that each of its words is a place that there is.
void read_program(const Tensor& program, const Layout& layout, StepArguments* a) {
  check_device("program", program, layout);
  const int64_t samples = program.dim() == 2 ? program.sizes()[0] : 0;
  STD_TORCH_CHECK(
      program.scalar_type() == ScalarType::Int && (samples == 1 || samples == layout.batch) && program.is_contiguous(),
      "program: expected int32 of shape (1 or ", layout.batch, ", words), contiguous");
  const int64_t words = program.numel() / std::max<int64_t>(samples, 1);
  a->program = static_cast<const int32_t*>(program.const_data_ptr());
  a->program_words = words;
  a->program_stride = samples > 1 ? words : 0;
  const int terms = terms_of(*a);
  STD_TORCH_CHECK(a->num_predictions >= 2 && terms <= kMaxTerms, "program: expected 2 to ", kMaxTerms,
                  " predictions with it, the sample counted, got ", terms);
  const int64_t inputs = moments_of(terms) + kOtherInputs + a->num_parameters;
  STD_TORCH_CHECK(inputs <= kMaxValues && words > terms, "program: expected at most ", kMaxValues,
                  " values, and the words of all instructions");
  if (!layout.is_cpu) return;  // the kernel sees to the words
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int32_t* next = program_of(*a, sample);
    const int64_t instructions = next[0];
    STD_TORCH_CHECK(instructions >= 0 && inputs + instructions <= kMaxValues && words_of(terms, instructions) <= words,
                    "program: expected at most ", kMaxValues, " values, and the words of all instructions");
    ++next;
    for (int k = 0; k < terms; ++k, ++next) {
      STD_TORCH_CHECK(*next >= 0 && *next < inputs + instructions,
                      "program: expected weights that are among its values");
    }
    for (int64_t n = 0; n < instructions; ++n) {
      bool known = *next >= 0 && *next < static_cast<int32_t>(Operation::count);
      ++next;
      for (int k = 1; k < kInstructionWords; ++k, ++next) known = known && *next >= 0 && *next < inputs + n;
      STD_TORCH_CHECK(known, "program: expected operations of earlier values, got another in instruction ", n);
    }
  }
}

// Reads a GPU's memory for sums, which is 0 between two steps, or for the guided prediction of groups.
void read_scratch(const Operands& operands, const Layout& layout, StepArguments* a) {
  STD_TORCH_CHECK(operands.scratch.has_value(), "scratch: expected a tensor with a program on a GPU");
  check_device("scratch", *operands.scratch, layout);
  const int64_t words = a->groups > 1 ? group_scratch_words(*a) : scratch_words(*a);
  STD_TORCH_CHECK(operands.scratch->scalar_type() == ScalarType::Double && operands.scratch->is_contiguous() &&
                      operands.scratch->numel() >= words,
                  "scratch: expected float64, contiguous, of at least ", words, " numbers");
  a->scratch = static_cast<double*>(operands.scratch->mutable_data_ptr());
}

// Reads what makes the weights from moments, and where they go.
void read_moments(const Operands& operands, const Layout& layout, StepArguments* a) {
  STD_TORCH_CHECK(operands.program.has_value() == operands.parameters.has_value() &&
                      operands.program.has_value() == operands.made.has_value(),
                  "program: expected program, parameters and made together");
  if (!operands.program.has_value()) return;
  const Tensor &parameters = *operands.parameters, &made = *operands.made;
  check_device("parameters", parameters, layout);
  STD_TORCH_CHECK(parameters.scalar_type() == ScalarType::Double && parameters.dim() == 3 &&
                      (parameters.sizes()[0] == a->steps || parameters.sizes()[0] == 1) &&
                      (parameters.sizes()[1] == layout.batch || parameters.sizes()[1] == 1) &&
                      parameters.sizes()[2] <= kMaxValues && parameters.is_contiguous(),
                  "parameters: expected float64 of shape (", a->steps, " or 1, ", layout.batch,
                  " or 1, numbers), contiguous");
  a->num_parameters = static_cast<int>(parameters.sizes()[2]);
  a->parameters = static_cast<const double*>(parameters.const_data_ptr());
  a->parameters_step_stride = parameters.sizes()[0] > 1 ? parameters.strides()[0] : 0;
  a->parameters_batch_stride = parameters.sizes()[1] > 1 ? parameters.strides()[1] : 0;
  check_device("made", made, layout);
  const int64_t columns = a->num_predictions + 1, rows = made.dim() == 2 ? made.sizes()[0] : -1;
  a->groups = layout.batch > 0 && rows > layout.batch ? rows / layout.batch : 1;
  STD_TORCH_CHECK(element_of("made", made) == (a->double_precision ? Element::float64 : Element::float32) &&
                      rows == layout.batch * a->groups && layout.elements_per_sample % a->groups == 0 &&
                      (made.sizes()[1] == columns || made.sizes()[1] == columns + 1) && made.is_contiguous(),
                  "made: expected the dtype of rows, shape (", layout.batch,
                  " or times what divides a sample's elements, ", columns, " or one more), contiguous");
  a->weighs_sample = made.sizes()[1] > columns;
  STD_TORCH_CHECK(layout.is_cpu || a->groups == 1 || groups_fit(*a), "made: expected shape (", layout.batch,
                  ", columns) on a GPU, or times so many groups of at most ", kMostOfGroup,
                  " elements, with two or three predictions, or two and a weight of the sample's own");
  a->made = made.mutable_data_ptr();
  read_program(*operands.program, layout, a);
  if (!layout.is_cpu) read_scratch(operands, layout, a);
}

void read_thresholds(const Tensor& inverse, const Layout& layout, StepArguments* a) {
  check_device("inverse_thresholds", inverse, layout);
  const int64_t words = layout.is_cpu ? 1 : kThresholdWords;
  STD_TORCH_CHECK(
      element_of("inverse_thresholds", inverse) == (a->double_precision ? Element::float64 : Element::float32) &&
          inverse.dim() == 2 && inverse.sizes()[0] == layout.batch && inverse.sizes()[1] == words &&
          inverse.is_contiguous(),
      "inverse_thresholds: expected the dtype of rows, shape (", layout.batch, ", ", words, "), contiguous");
  a->inverse_thresholds = inverse.mutable_data_ptr();
  a->inverse_thresholds_stride = words;
}

}  // namespace

// The fields are initialised in the order of their declaration, which is that of the stack.
Operands::Operands(StableIValue* stack)
    : next(stack)
#define FASTGUIDE_TAKE(type, name) , name(torch::stable::detail::to<type>(*next++))
          FASTGUIDE_ARGUMENTS(FASTGUIDE_TAKE)
#undef FASTGUIDE_TAKE
{
}

Operands::~Operands() = default;

void read(const Operands& operands, const Layout& layout, std::vector<Input>* predictions, StepArguments* a) {
  read_tensors(operands, layout, a);
  STD_TORCH_CHECK(operands.weights.dim() == 3, "weights: expected three dimensions");
  read_predictions(operands.predictions, operands.weights.sizes()[2] - 1, layout, predictions, a);
  read_rows(operands.rows, layout, a);
  read_weights(operands.weights, layout, a);
  read_position(operands, layout, a);
  read_noise(operands, layout, a);
  if (operands.staged.has_value()) a->staged_copies = read_copies("staged", *operands.staged, layout, &a->staged);
  if (operands.history.has_value()) read_history(*operands.history, layout, a);
  read_moments(operands, layout, a);
  if (operands.inverse_thresholds.has_value()) read_thresholds(*operands.inverse_thresholds, layout, a);
}

namespace {

// ---- The operators ----

// The boxed function of the operator: its arguments are the stack's entries.
void guided_step(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs) {
  STD_TORCH_CHECK(num_arguments == kArguments && num_outputs == 0, "guided_step: expected ", kArguments,
                  " arguments and no outputs, got ", num_arguments, " and ", num_outputs);
  const Operands operands(stack);
  const Layout layout = layout_of(operands.out);
  StepArguments a{};
  std::vector<Input> predictions;
  read(operands, layout, &predictions, &a);
  check(a, layout.is_cpu);
  run(a, layout.is_cpu, layout.device);
}

// The boxed function of fastguide::record_step, which has one argument more: the memory for the record, int64.
void record_step(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs) {
  STD_TORCH_CHECK(num_arguments == kArguments + 1 && num_outputs == 0, "record_step: expected ", kArguments + 1,
                  " arguments and no outputs, got ", num_arguments, " and ", num_outputs);
  const Operands operands(stack);
  const Tensor memory = torch::stable::detail::to<Tensor>(stack[kArguments]);
  const Layout layout = layout_of(operands.out);
  Record record{};
  std::vector<Input> predictions;
  read(operands, layout, &predictions, &record.arguments);
  STD_TORCH_CHECK(record.arguments.noise_kind != Noise::torch_stream, "philox: expected none in a record");
  record.is_cpu = layout.is_cpu;
  record.device = layout.device;
  if (operands.predictions.size() == 1 && predictions.size() > 1) {
    record.prediction_bytes =
        static_cast<const char*>(predictions[1].data) - static_cast<const char*>(predictions[0].data);
  }
  const size_t bytes = sizeof(Record) + predictions.size() * sizeof(Input);
  STD_TORCH_CHECK(memory.is_cpu() && memory.scalar_type() == ScalarType::Long && memory.is_contiguous() &&
                      static_cast<size_t>(memory.numel()) * sizeof(int64_t) >= bytes,
                  "record: expected int64 on the CPU, of at least ", bytes, " bytes");
  char* to = static_cast<char*>(memory.mutable_data_ptr());
  std::memcpy(to, &record, sizeof(Record));
  if (!predictions.empty()) std::memcpy(to + sizeof(Record), predictions.data(), bytes - sizeof(Record));
}

}  // namespace
}  // namespace fastguide

STABLE_TORCH_LIBRARY_IMPL(fastguide, CPU, m) {
  m.impl("guided_step", &fastguide::guided_step);
  m.impl("record_step", &fastguide::record_step);
}

STABLE_TORCH_LIBRARY_IMPL(fastguide, CUDA, m) {
#if defined(FASTGUIDE_CUDA)
  m.impl("guided_step", &fastguide::guided_step);
#endif
  m.impl("record_step", &fastguide::record_step);  // of Triton's steps, too
}
