// Makes a step on the CPU's threads; where its weights come from moments, these and the weights first.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "binding/capability.h"
#include "binding/run.h"
#include "kernels/cpu/launch.h"
#include "kernels/cursor.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {
namespace {

constexpr int64_t kNoiseGrain = kGrain / 4;  // the same where noise is drawn too, which takes several times as long

// Calls f(begin, end) for ranges of 0 to total, in parallel if that is worth it.
template <typename F>
void in_parallel(int64_t total, int64_t grain, const F& f) {
  if (total <= grain) {
    f(int64_t{0}, total);
  } else {
    torch::stable::parallel_for(0, total, grain, f);
  }
}

// A step that makes its weights. Samples, parts and elements are counted over the whole batch.
template <typename T>
class WeighedStep {
 public:
  explicit WeighedStep(const StepArguments& a)
      : a_(a),
        step_(a),
        functions_(selected_functions()),
        parts_(parts_of(a)),
        moments_(moments_of(terms_of(a))),
        columns_(made_columns(a)),
        weights_(static_cast<size_t>(a.batch * columns_)) {
    step_.weights = weights_.data();  // `made` may be another step's at the same time
    step_.weights_step_stride = 0;
    step_.weights_batch_stride = columns_;
  }

  // Where there are samples for all threads, each makes one after the other, and they need not wait for each other.
  void run(int64_t grain) {
    const int64_t elements = a_.elements_per_sample;
    if (a_.batch * elements <= grain || a_.batch >= torch::stable::get_num_threads()) {
      in_parallel(a_.batch, std::max<int64_t>(grain / elements, 1), [&](int64_t begin, int64_t end) {
        std::vector<double> sums(static_cast<size_t>(parts_ * moments_));
        for (int64_t sample = begin; sample < end; ++sample) run_sample(sample, sums.data());
      });
    } else {
      run_parts(grain);
    }
    std::copy(weights_.begin(), weights_.end(), static_cast<T*>(a_.made));
  }

 private:
  void run_sample(int64_t sample, double* sums) {
    for (int64_t part = 0; part < parts_; ++part) functions_.part_moments(a_, sample, part, sums + part * moments_);
    weigh(sample, sums);
    functions_.step_range(step_, sample * a_.elements_per_sample, (sample + 1) * a_.elements_per_sample);
  }

  // Shares the parts of all samples out among the threads, twice in the same way.
  void run_parts(int64_t grain) {
    const int64_t count = a_.batch * parts_, least = std::max<int64_t>(grain / kPart, 1);
    std::vector<double> sums(static_cast<size_t>(count * moments_));
    in_parallel(count, least, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        functions_.part_moments(a_, k / parts_, k % parts_, sums.data() + k * moments_);
      }
    });
    for (int64_t sample = 0; sample < a_.batch; ++sample) weigh(sample, sums.data() + sample * parts_ * moments_);
    in_parallel(count, least, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) step_part(k);
    });
  }

  // Makes one sample's weights of the moments of its parts, which follow each other.
  void weigh(int64_t sample, const double* sums) {
    const Position position = position_of(a_, sample);
    if (!is_live(a_, position)) return;
    double values[kMaxValues];
    std::copy(sums, sums + moments_, values);
    for (int64_t part = 1; part < parts_; ++part) {
      for (int n = 0; n < moments_; ++n) values[n] += sums[part * moments_ + n];
    }
    make_weights<T>(a_, program_of(a_, sample), sample, position, values, weights_.data() + sample * columns_);
  }

  void step_part(int64_t part) {
    const int64_t sample = part / parts_, begin = part % parts_ * kPart, first = sample * a_.elements_per_sample;
    functions_.step_range(step_, first + begin, first + std::min(begin + kPart, a_.elements_per_sample));
  }

  const StepArguments& a_;
  StepArguments step_;
  StepFunctions functions_;
  int64_t parts_, moments_, columns_;
  std::vector<T> weights_;
};

}  // namespace

void run_on_cpu(const StepArguments& a) {
  const int64_t grain = a.noise_kind == Noise::portable ? kNoiseGrain : kGrain;
  if (a.program == nullptr) {
    const StepFunctions functions = selected_functions();
    in_parallel(a.batch * a.elements_per_sample, grain,
                [&](int64_t begin, int64_t end) { functions.step_range(a, begin, end); });
  } else if (a.double_precision) {
    WeighedStep<double>(a).run(grain);
  } else {
    WeighedStep<float>(a).run(grain);
  }
  if (a.cursor != nullptr) advance(a, position_of(a, 0), 0, 1);
}

}  // namespace fastguide
