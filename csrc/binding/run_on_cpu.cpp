// Makes a step on the CPU's threads; where its weights come from moments, or its x0 has a threshold, these first.
#include <algorithm>
#include <memory>
#include <vector>

#include "binding/capability.h"
#include "binding/groups_on_cpu.h"
#include "binding/parallel.h"
#include "binding/run.h"
#include "binding/team.h"
#include "kernels/cpu/launch.h"
#include "kernels/cpu/spread.h"
#include "kernels/cpu/stream.h"
#include "kernels/cpu/threshold.h"
#include "kernels/cursor.h"
#include "kernels/thresholds.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {
namespace {

// The same where noise is drawn too, which takes several times as long, and where a threshold is found first.
constexpr int64_t kNoiseGrain = kGrain / 4, kThresholdGrain = kGrain / 2;

// Of a sample that has been read once, the last elements are in the second-level cache: a step takes so many at once,
// from the end backwards.
constexpr int64_t kAtOnce = 8 * kPart;

// Bytes of predictions that a second-level cache still has after their moments, beside what a step streams through it.
constexpr int64_t kAtHand = int64_t{1} << 20;

// A step that needs numbers of whole samples first: weights from moments, or thresholds. Samples, parts and elements
// are counted over the whole batch.
template <typename T>
class PreparedStep {
 public:
  explicit PreparedStep(const StepArguments& a)
      : a_(a),
        step_(a),
        functions_(selected_functions(a.double_precision)),
        parts_(parts_of(a)),
        moments_(a.program != nullptr ? moments_of(terms_of(a)) : 0),
        columns_(made_columns(a)),
        weights_(static_cast<size_t>(a.program != nullptr ? a.batch * columns_ : 0)),
        inverse_thresholds_(static_cast<size_t>(a.inverse_thresholds != nullptr ? a.batch : 0), T(1)) {
    // What is made may be another step's at the same time, but for these.
    if (a.program != nullptr) {
      step_.weights = weights_.data();
      step_.weights_step_stride = 0;
      step_.weights_batch_stride = columns_;
    }
    if (a.inverse_thresholds != nullptr) {
      step_.inverse_thresholds = inverse_thresholds_.data();
      step_.inverse_thresholds_stride = 1;
    }
  }

  // Where there are samples for all threads, each makes one after the other, and they need not wait for each other; but
  // samples that are too large for the cache of one are shared.
  void run(int64_t grain) {
    const int64_t elements = a_.elements_per_sample, threads = torch::stable::get_num_threads();
    const int members = members_of_team(threads);
    if (members > 1) {
      run_in_teams(members, threads / members);
    } else if (a_.batch * elements <= grain || a_.batch >= threads) {
      in_parallel(a_.batch, std::max<int64_t>(grain / elements, 1), [&](int64_t begin, int64_t end) {
        std::vector<double> sums(static_cast<size_t>(parts_ * moments_));
        const std::unique_ptr<KeyOf<T>[]> between(
            inverse_thresholds_.empty() ? nullptr : new KeyOf<T>[size_t(elements + kMoreKeys)]);
        for (int64_t sample = begin; sample < end; ++sample) run_sample(sample, sums.data(), between.get());
      });
    } else {
      run_parts(std::max<int64_t>(grain / kPart, 1));
    }
    std::copy(weights_.begin(), weights_.end(), static_cast<T*>(a_.made));
    for (size_t k = 0; k < inverse_thresholds_.size(); ++k) {
      static_cast<T*>(a_.inverse_thresholds)[int64_t(k) * a_.inverse_thresholds_stride] = inverse_thresholds_[k];
    }
  }

 private:
  void run_sample(int64_t sample, double* sums, KeyOf<T>* between) {
    if (moments_ > 0) {
      functions_.part_moments(a_, sample, 0, parts_, sums);
      weigh(sample, sums);
    }
    if (has_threshold(sample)) {
      Tally<T> tallied;
      for (int64_t part = 0; part < parts_; ++part) tally_part(sample, part, &tallied, between);
      set_threshold(sample, tallied, between);
    }
    const int64_t first = sample * a_.elements_per_sample;
    for (int64_t end = a_.elements_per_sample, begin; end > 0; end = begin) {
      begin = (end - 1) / kAtOnce * kAtOnce;
      functions_.step_range(step_, first + begin, first + end);
    }
  }

  // The fewest threads whose caches hold a sample's predictions together; 1 where these would be too many, or no help.
  int members_of_team(int64_t threads) const {
    if (moments_ == 0 || !inverse_thresholds_.empty() || !are_large(a_)) return 1;
    int64_t bytes = 0;
    for (int k = 0; k < a_.num_predictions; ++k) {
      bytes += a_.elements_per_sample * element_bytes(a_.predictions[k].element);
    }
    for (int members = 1; members <= std::min<int64_t>(kMostMembers, threads); ++members) {
      const int64_t teams = threads / members;
      const bool is_fair = a_.batch % teams == 0 || a_.batch >= 4 * teams;  // to all teams
      if (threads % members == 0 && is_fair && bytes <= members * kAtHand) return members;
    }
    return 1;
  }

  // Shares the samples out among teams of threads, and each sample among the members of its team.
  void run_in_teams(int members, int64_t teams) {
    Teams shared(members, a_.batch);
    std::vector<double> sums(static_cast<size_t>(teams * parts_ * moments_));
    const auto begin_of = [&](int portion) { return portion * parts_ / members; };
    torch::stable::parallel_for(0, teams * members, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t team = k / members;
        double* of_team = sums.data() + team * parts_ * moments_;
        const auto add_up = [&](int64_t sample, int portion) {
          const int64_t from = begin_of(portion), count = begin_of(portion + 1) - from;
          functions_.part_moments(a_, sample, from, count, of_team + from * moments_);
        };
        const auto step = [&](int64_t sample, int portion) {
          step_parts(sample, begin_of(portion), begin_of(portion + 1));
        };
        shared.work(
            int(k % members), team * a_.batch / teams, (team + 1) * a_.batch / teams, add_up,
            [&](int64_t sample) { weigh(sample, of_team); }, step);
      }
    });
  }

  // Shares the parts of all samples out among the threads, each time in the same way.
  void run_parts(int64_t least) {
    const int64_t count = a_.batch * parts_;
    if (moments_ > 0) {
      std::vector<double> sums(static_cast<size_t>(count * moments_));
      in_parallel(count, least, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin, count; k < end; k += count) {
          count = std::min(end - k, parts_ - k % parts_);
          functions_.part_moments(a_, k / parts_, k % parts_, count, sums.data() + k * moments_);
        }
      });
      for (int64_t sample = 0; sample < a_.batch; ++sample) weigh(sample, sums.data() + sample * parts_ * moments_);
    }
    for (int64_t sample = 0; sample < a_.batch; ++sample) {
      if (has_threshold(sample)) share_threshold(sample, least);
    }
    in_parallel(count, least, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) step_parts(k / parts_, k % parts_, k % parts_ + 1);
    });
  }

  // Makes one sample's weights of the moments of its parts, which follow each other, and may be overwritten.
  void weigh(int64_t sample, double* sums) {
    const Position position = position_of(a_, sample);
    if (!is_live(a_, position)) return;
    double values[kMaxValues];
    std::copy(sums, sums + moments_, values);
    for (int64_t part = 1; part < parts_; ++part) {
      for (int n = 0; n < moments_; ++n) values[n] += sums[part * moments_ + n];
    }
    const int terms = terms_of(a_), wanted = moments_read(program_of(a_, sample), terms);
    if (!a_.double_precision && !are_spread(values, terms, wanted == moments_, double(a_.elements_per_sample))) {
      add_exactly(sample, wanted, sums, values);
    }
    make_weights<T>(a_, program_of(a_, sample), sample, position, values, weights_.data() + sample * columns_);
  }

  // Adds a sample up again, in double: with all threads, unless one of them is making it. sums: gets those of parts.
  void add_exactly(int64_t sample, int wanted, double* sums, double* values) const {
    in_parallel(parts_, kGrain / kPart, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t from = part * kPart, count = std::min(kPart, a_.elements_per_sample - from);
        functions_.group_part_moments(a_, sample, from, count, wanted, true, sums + part * moments_);
      }
    });
    std::fill(values, values + moments_, 0.0);
    for (int64_t part = 0; part < parts_; ++part) {
      for (int n = 0; n < wanted; ++n) values[n] += sums[part * moments_ + n];
    }
  }

  const Row<T>& row_of(int64_t sample) const { return row_at<T>(a_, position_of(a_, sample).index); }

  bool has_threshold(int64_t sample) const {
    return !inverse_thresholds_.empty() && is_live(a_, position_of(a_, sample)) && row_of(sample).quantile > T(0);
  }

  void tally_part(int64_t sample, int64_t part, Tally<T>* so_far, KeyOf<T>* between) const {
    const int64_t begin = part * kPart, count = std::min(kPart, a_.elements_per_sample - begin);
    tally(functions_, step_, sample, begin, count, so_far, between);
  }

  void set_threshold(int64_t sample, const Tally<T>& tallied, KeyOf<T>* between) {
    const Row<T>& row = row_of(sample);
    inverse_thresholds_[size_t(sample)] =
        T(1) / threshold_of(functions_, row.quantile, row.clip, a_.elements_per_sample, tallied, between);
  }

  // The threshold of one sample whose parts are shared out among the threads; each has its own place for its keys.
  void share_threshold(int64_t sample, int64_t least) {
    const std::unique_ptr<KeyOf<T>[]> between(new KeyOf<T>[size_t(parts_ * (kPart + kMoreKeys))]);
    std::vector<Tally<T>> tallies(static_cast<size_t>(parts_));
    in_parallel(parts_, least, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        tally_part(sample, k, &tallies[size_t(k)], between.get() + k * (kPart + kMoreKeys));
      }
    });
    Tally<T> sum;
    for (int64_t k = 0; k < parts_; ++k) {
      const KeyOf<T>* from = between.get() + k * (kPart + kMoreKeys);
      std::copy(from, from + tallies[size_t(k)].between, between.get() + sum.between);
      add_tally(tallies[size_t(k)], &sum);
    }
    set_threshold(sample, sum, between.get());
  }

  void step_parts(int64_t sample, int64_t begin, int64_t end) {
    const int64_t first = sample * a_.elements_per_sample;
    functions_.step_range(step_, first + begin * kPart, first + std::min(end * kPart, a_.elements_per_sample));
  }

  const StepArguments& a_;
  StepArguments step_;
  StepFunctions functions_;
  int64_t parts_, moments_, columns_;
  std::vector<T> weights_, inverse_thresholds_;
};

template <typename T>
void run_prepared(const StepArguments& a, int64_t grain) {
  if (a.program != nullptr && a.groups > 1) {
    GroupedStep<T> groups(a);
    groups.run(grain);
    if (a.inverse_thresholds != nullptr) PreparedStep<T>(groups.step_of_guided()).run(grain);
  } else {
    PreparedStep<T>(a).run(grain);
  }
}

}  // namespace

void run_on_cpu(const StepArguments& a) {
  const int64_t grain = a.noise_kind == Noise::portable   ? kNoiseGrain
                        : a.inverse_thresholds != nullptr ? kThresholdGrain
                                                          : kGrain;
  if (a.program == nullptr && a.inverse_thresholds == nullptr) {
    const StepFunctions functions = selected_functions(a.double_precision);
    in_parallel(a.batch * a.elements_per_sample, grain,
                [&](int64_t begin, int64_t end) { functions.step_range(a, begin, end); });
  } else if (a.double_precision) {
    run_prepared<double>(a, grain);
  } else {
    run_prepared<float>(a, grain);
  }
  if (a.cursor != nullptr) advance(a, position_of(a, 0), 0, 1);
}

}  // namespace fastguide
