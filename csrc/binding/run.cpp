// Makes a step of plain data: see run.h.
#include "binding/run.h"

#if defined(FASTGUIDE_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/headeronly/util/Exception.h>

#include "binding/tensors.h"
#include "kernels/cursor.h"
#include "kernels/gpu/launch.h"
#include "maths/step.h"
#if defined(FASTGUIDE_CUDA)
// Part of libtorch_cuda, which torch for the CPU lacks: weak, so that one library loads with every torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastguide {
namespace {

// On a GPU the host does not wait for indices: the kernel checks them.
void check_position(const StepArguments& a, bool is_cpu) {
  const bool on_host = (a.indices == nullptr && a.cursor == nullptr) || is_cpu;
  const bool varied = a.indices_stride != 0 || a.cursor_stride != 0;
  for (int64_t b = 0; on_host && b < (varied ? a.batch : 1); ++b) {
    const Position position = position_of(a, b);
    STD_TORCH_CHECK(!is_live(a, position) || in_table(a, position), "index: expected values from 0 to ", a.steps - 1,
                    ", got ", position.index);
  }
}

void check_memory(const StepArguments& a) {
  const Extent layout{a.batch, a.elements_per_sample};
  for_each_output(a, [&](Argument output_name, const Output& output, int copies) {
    if (output.data == nullptr) return;
    // A staged sample is written while the inputs of others are still to be read; the history is read as well.
    const bool never_shared = output_name == Argument::staged || output_name == Argument::history;
    for_each_input(a, a.predictions, [&](Argument name, const Input& input) {
      if (never_shared || !may_be_output(name)) {
        check_apart(name_of(output_name), output, copies * layout.batch, name_of(name), input, layout);
      } else {
        check_overlap(name_of(output_name), output, name_of(name), input, layout);
      }
    });
    if (never_shared) {
      const char* name = name_of(output_name);
      const int64_t samples = copies * layout.batch;
      check_apart(name, output, samples, "out", as_input(a.out), layout);
      check_apart(name, output, samples, "original", as_input(a.original), layout);
      check_apart(name, output, samples, "index", integers(a.indices, a.indices_stride), {a.batch, 1});
      check_apart(name, output, samples, "seeds", integers(a.seeds, a.seeds_stride), {a.batch, 1});
    }
  });
  check_overlap("out", a.out, "original", as_input(a.original), layout);
  STD_TORCH_CHECK(a.out.data != a.original.data || a.out.data == nullptr, "original: expected other memory than out's");
}

// Calls launch(stream) for the current stream of a device, after what every launch on a GPU demands. Throws what it
// returns, unless that is null. Of any type, it is compiled where there is CUDA alone.
template <typename F>
void on_gpu(const StepArguments& a, int32_t device, const F& launch) {
#if defined(FASTGUIDE_CUDA)
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "out: expected a CPU tensor, as this torch has no CUDA");
  STD_TORCH_CHECK(a.num_predictions <= kMaxPredictions, "predictions: expected at most ", kMaxPredictions,
                  " on a GPU, got ", a.num_predictions);
  STD_TORCH_CHECK(!a.double_precision, "sample: expected float32, bfloat16 or float16 on a GPU, got float64");
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "out: torch names no current stream on its device");
  const char* error = launch(stream);
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernel could not be started: ", error);
#else
  (void)a, (void)device, (void)launch;
  STD_TORCH_CHECK(false, "out: expected a CPU tensor, as fastguide was built without CUDA");
#endif
}

void refuse_float64(const char* name, Element element) {
  STD_TORCH_CHECK(element != Element::float64, name, ": expected no float64 tensors on a GPU");
}

void run_on_gpu(const StepArguments& a, int32_t device) {
  for_each_output(a, [](Argument name, const Output& output, int) { refuse_float64(name_of(name), output.element); });
  for_each_input(a, a.predictions,
                 [](Argument name, const Input& input) { refuse_float64(name_of(name), input.element); });
  on_gpu(a, device, [&](auto* stream) { return cuda::launch_step(a, device, stream); });
}

}  // namespace

void check(const StepArguments& a, bool is_cpu) {
  check_position(a, is_cpu);
  check_memory(a);
}

void run_backward_on_gpu(const StepArguments& a, const BackwardArguments& b, int32_t device) {
  for_each_input(a, a.predictions,
                 [](Argument name, const Input& input) { refuse_float64(name_of(name), input.element); });
  const Element gradients[] = {b.grad_out.element,    b.grad_original.element, b.grad_left.element,
                               b.grad_sample.element, b.grad_gradient.element, b.grad_variance.element,
                               b.grad_noise.element,  b.grad_anchor.element,   b.grad_history.element};
  for (const Element element : gradients) refuse_float64("gradients", element);
  for (int k = 0; b.grad_predictions != nullptr && k < a.num_predictions; ++k) {
    refuse_float64("grad_predictions", b.grad_predictions[k].element);
  }
  on_gpu(a, device, [&](auto* stream) { return cuda::launch_step_backward(a, b, device, stream); });
}

void run(const StepArguments& a, bool is_cpu, int32_t device) {
  if (a.batch * a.elements_per_sample == 0) return;
  if (is_cpu) {
    run_on_cpu(a);
  } else {
    run_on_gpu(a, device);
  }
}

}  // namespace fastguide
