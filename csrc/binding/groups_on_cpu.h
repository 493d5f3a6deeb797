// Makes a step on the CPU's threads whose groups of elements have weights of their own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "binding/capability.h"
#include "binding/parallel.h"
#include "kernels/cpu/launch.h"
#include "kernels/cursor.h"
#include "kernels/weights.h"
#include "maths/program.h"

namespace fastguide {

constexpr int64_t kChunk = 2048;  // elements whose tensors fit the first-level cache

// The guided prediction is made of some elements at a time, and the step of that one prediction while it is at hand: of
// some short groups, or of a part of a long one. Where thresholds are made of whole samples, it is kept for these.
template <typename T>
class GroupedStep {
 public:
  explicit GroupedStep(const StepArguments& a)
      : a_(a),
        step_(a),
        functions_(selected_functions(a.double_precision)),
        size_(a.elements_per_sample / a.groups),
        parts_((size_ + kPart - 1) / kPart),
        made_(static_cast<size_t>(a.batch * a.groups * made_columns(a))),
        weights_(static_cast<size_t>(2 * a.batch)),
        guided_(static_cast<size_t>(a.inverse_thresholds != nullptr ? a.batch * a.elements_per_sample : 0)) {
    for (int64_t sample = 0; sample < a.batch; ++sample) {
      const Position position = position_of(a, sample);
      weights_[size_t(2 * sample)] = T(1);
      if (is_live(a, position)) weights_[size_t(2 * sample + 1)] = constant_scale<T>(a, sample, position.index);
    }
    step_.program = nullptr;
    step_.weighs_sample = false;
    step_.num_predictions = 1;
    step_.weights = weights_.data();
    step_.weights_step_stride = 0;
    step_.weights_batch_stride = 2;
    prediction_ = prediction(guided_.data(), a.elements_per_sample);
    step_.predictions = &prediction_;
  }

  void run(int64_t grain) {
    const int64_t groups = a_.batch * a_.groups, threads = torch::stable::get_num_threads();
    if (parts_ == 1) {
      run_short(grain);
    } else if (groups * size_ <= grain || groups % threads == 0 || groups >= 4 * threads) {
      run_long(grain);
    } else {
      run_parts(std::max<int64_t>(grain / kPart, 1));  // few groups would leave threads idle
    }
    std::copy(made_.begin(), made_.end(), static_cast<T*>(a_.made));
  }

  // The step of the guided predictions, which waits for thresholds of whole samples.
  const StepArguments& step_of_guided() const { return step_; }

 private:
  // A group of several parts: the sums of its parts' moments, and its weights.
  struct Group {
    int64_t sample, begin;  // among the sample's elements
    bool is_live;
    int wanted;  // moments
    double moments[kMostMoments], weights[kMaxTerms + 1];
  };

  static Input prediction(const void* m, int64_t batch_stride) {
    return {m, batch_stride, sizeof(T) == sizeof(float) ? Element::float32 : Element::float64};
  }

  // Where the guided prediction of a sample's elements from `begin` on is made.
  T* place_of(int64_t sample, int64_t begin, T* scratch) {
    return guided_.empty() ? scratch : guided_.data() + sample * a_.elements_per_sample + begin;
  }

  // Makes the step of elements whose guided prediction is made, unless it is to wait.
  void step(int64_t sample, int64_t begin, int64_t count, const T* m) {
    if (!guided_.empty()) return;
    StepArguments step = step_;
    // Where the sample would begin, of which these are the elements from `begin` on.
    const uintptr_t origin = reinterpret_cast<uintptr_t>(m) - static_cast<uintptr_t>(begin) * sizeof(T);
    const Input guided = prediction(reinterpret_cast<const void*>(origin), 0);
    step.predictions = &guided;
    const int64_t before = sample * a_.elements_per_sample + begin;
    functions_.step_range(step, before, before + count);
  }

  // ---- Groups of one part: some at a time ----

  void run_short(int64_t grain) {
    const int64_t groups = std::max<int64_t>(kChunk / size_, 1), chunks = (a_.groups + groups - 1) / groups;
    in_parallel(a_.batch * chunks, std::max<int64_t>(grain / (groups * size_), 1), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(static_cast<size_t>(guided_.empty() ? groups * size_ : 0));
      for (int64_t k = begin; k < end; ++k) {
        const int64_t sample = k / chunks, first = k % chunks * groups, count = std::min(groups, a_.groups - first);
        if (!is_live(a_, position_of(a_, sample))) continue;
        T* const m = place_of(sample, first * size_, scratch.data());
        functions_.guide_groups(a_, sample, first, count,
                                made_.data() + (sample * a_.groups + first) * made_columns(a_), m);
        step(sample, first * size_, count * size_, m);
      }
    });
  }

  // ---- Groups of several parts, counted over the whole batch ----

  // Where there are groups for all threads, each makes one after the other, and they need not wait for each other.
  void run_long(int64_t grain) {
    in_parallel(a_.batch * a_.groups, std::max<int64_t>(grain / size_, 1), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(size_t{kPart});
      std::vector<double> moments(static_cast<size_t>(parts_ * kMostMoments));
      for (int64_t k = begin; k < end; ++k) {
        Group group = group_of(k);
        if (!group.is_live) continue;
        for (const bool exactly : {false, true}) {
          for (int64_t part = 0; part < parts_; ++part) add_up(group, part, exactly, moments.data());
          if (is_exact(&group, moments.data())) break;
        }
        weigh(k, &group);
        for (int64_t part = 0; part < parts_; ++part) make(group, part, scratch.data());
      }
    });
  }

  // Shares the parts of all groups out among the threads, each time in the same way.
  void run_parts(int64_t least) {
    const int64_t count = a_.batch * a_.groups;
    std::vector<Group> groups(static_cast<size_t>(count));
    for (int64_t k = 0; k < count; ++k) groups[size_t(k)] = group_of(k);
    std::vector<double> moments(static_cast<size_t>(count * parts_ * kMostMoments));
    std::vector<int64_t> left;  // groups without moments yet
    for (int64_t k = 0; k < count; ++k) {
      if (groups[size_t(k)].is_live) left.push_back(k);
    }
    for (const bool exactly : {false, true}) {
      in_parallel(int64_t(left.size()) * parts_, least, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const int64_t k = left[size_t(n / parts_)];
          add_up(groups[size_t(k)], n % parts_, exactly, moments.data() + k * parts_ * kMostMoments);
        }
      });
      left.erase(std::remove_if(left.begin(), left.end(),
                                [&](int64_t k) {
                                  return is_exact(&groups[size_t(k)], moments.data() + k * parts_ * kMostMoments);
                                }),
                 left.end());
    }
    for (int64_t k = 0; k < count; ++k) {
      if (groups[size_t(k)].is_live) weigh(k, &groups[size_t(k)]);
    }
    in_parallel(count * parts_, least, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(size_t{kPart});
      for (int64_t n = begin; n < end; ++n) {
        if (groups[size_t(n / parts_)].is_live) make(groups[size_t(n / parts_)], n % parts_, scratch.data());
      }
    });
  }

  Group group_of(int64_t k) const {
    Group group{};
    group.sample = k / a_.groups;
    group.begin = k % a_.groups * size_;
    group.is_live = is_live(a_, position_of(a_, group.sample));
    group.wanted = moments_read(program_of(a_, group.sample), terms_of(a_));
    return group;
  }

  int64_t count_of(int64_t part) const { return std::min(kPart, size_ - part * kPart); }

  void add_up(const Group& group, int64_t part, bool exactly, double* moments) const {
    functions_.group_part_moments(a_, group.sample, group.begin + part * kPart, count_of(part), group.wanted, exactly,
                                  moments + part * kMostMoments);
  }

  // Adds the moments of a group's parts up, in their order; returns whether that is exact enough.
  bool is_exact(Group* group, const double* moments) const {
    for (int n = 0; n < group->wanted; ++n) {
      group->moments[n] = moments[n];
      for (int64_t part = 1; part < parts_; ++part) group->moments[n] += moments[part * kMostMoments + n];
    }
    return functions_.are_exact_enough(a_, group->wanted, group->moments);
  }

  void weigh(int64_t k, Group* group) {
    double values[kMaxValues][1];
    for (int n = 0; n < group->wanted; ++n) values[n][0] = group->moments[n];
    make_weights<T, 1>(a_, program_of(a_, group->sample), group->sample, position_of(a_, group->sample), values, 1,
                       group->weights);
    for (int n = 0; n < made_columns(a_); ++n) made_[size_t(k * made_columns(a_) + n)] = T(group->weights[n]);
  }

  void make(const Group& group, int64_t part, T* scratch) {
    const int64_t begin = group.begin + part * kPart, count = count_of(part);
    T* const m = place_of(group.sample, begin, scratch);
    functions_.guide_group_part(a_, group.weights, group.moments, group.sample, begin, count, m);
    step(group.sample, begin, count, m);
  }

  const StepArguments& a_;
  StepArguments step_;
  StepFunctions functions_;
  int64_t size_, parts_;  // elements and parts of a group
  std::vector<T> made_, weights_, guided_;
  Input prediction_;
};

}  // namespace fastguide
