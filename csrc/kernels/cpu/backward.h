// The backward pass of a step, and its distance from its mean, by parts of a sample: in blocks that stay in the
// first-level cache, each a few operations on runs. Compiled once; the operations are each instruction set's.
//
// With G the gradient of x', behind the mask, O that of x0 and L that of the history's new entry:
//
//   q   = out_x0*G + O + hist_x0*L where x0 was not clipped, else 0: as bits say, or else the inputs
//   dm  = x0_pred*x0_scale*q + out_pred*G                 dp_k = w_k*dm
//   dx  = x0_sample*x0_scale*q + out_sample*G + hist_sample*L
//   dg  = s*(x0_grad*x0_scale*q + (out_grad + out_var_grad*sigma^2)*G)
//   dz  = out_noise*sigma*G + x0_noise*O                  dxa = out_anchor*G            dH_h = out_hist_h*G + L_h
//   dv  = logvar_span*(out_noise*sigma*z/2 + out_var_grad*sigma^2*s*g)*G
//   dw_k is the sum of dm*(p_k - p_0) over a sample, that of the sum of weights the sum of dm*p_0, and ds that of
//   dg/s*g
#pragma once

#include <cstring>

#include "kernels/backward.h"
#include "kernels/cpu/launch.h"
#include "kernels/cursor.h"
#include "maths/step.h"

namespace fastguide {

// What the runs of one block are computed in.
template <typename T>
struct Gradients {
  alignas(64) T zeros[kBlock] = {};
  T in[kBlock], original[kBlock], left[kBlock], q[kBlock], dm[kBlock], to[kBlock], x[kBlock], y[kBlock];
  T g[kBlock], p0[kBlock], p[kBlock], sigma[kBlock], in_sigma[kBlock], in_variance[kBlock];
};

// Asks for the lines of `bytes` bytes from so many behind `data` on, which may lie behind the end of its memory. A pass
// that reads little and writes several tensors waits for the lines that it writes, and asks for too few at a time where
// a store is the first to need one.
FASTGUIDE_INLINE void prefetch_to_write(const void* data, int64_t behind, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(behind);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(begin + uintptr_t(i)), 1);
}

// The backward pass of a part of a sample.
template <typename T>
class Backward {
 public:
  // sums: get what the weights have of it added, unless they are null.
  Backward(const RunFunctions<T>& runs, const StepArguments& a, const BackwardArguments& b, int64_t sample,
           double* sums)
      : runs_(runs), a_(a), b_(b), sample_(sample), sums_(sums) {
    const int64_t index = position_of(a, sample).index;
    weights_ = static_cast<const T*>(a.weights) + index * a.weights_step_stride + sample * a.weights_batch_stride;
    raw_ = row_at<T>(a, index);
    scale_ = gradient_scale(weights_, a.num_predictions);
    row_ = with_gradient_scale(raw_, scale_);
  }

  void run(int64_t begin, int64_t end) {
    for (offset_ = begin; offset_ < end; offset_ += kBlock) {
      count_ = end - offset_ < kBlock ? end - offset_ : kBlock;
      start();
      write_sample();
      write_predictions();
      write_others();
      write_earlier();
    }
  }

 private:
  // Returns a run; copy: of tensors that hold the batch several times.
  const T* loaded(const Input& input, T* to, int64_t copy = 0) const {
    if (input.data == nullptr) return s_.zeros;
    return runs_.load(input, copy * a_.batch + sample_, offset_, count_, to);
  }

  // to = c*x + d*y; what has a coefficient of 0 is not read.
  void sum(T c, const T* x, T d, const T* y, T* to) const {
    runs_.sum_of_two(c, c != T(0) ? x : s_.zeros, d, d != T(0) ? y : s_.zeros, count_, to);
  }

  void write(const Output& output, T c, const T* x, T d, const T* y, int64_t copy = 0) {
    if (output.data == nullptr) return;
    const int64_t place = copy * a_.batch + sample_;
    const bool in_place = output.element == (sizeof(T) == sizeof(float) ? Element::float32 : Element::float64);
    const int64_t bytes = element_bytes(output.element);
    prefetch_to_write(output.data, (place * output.batch_stride + offset_ + kBlock) * bytes, kBlock * bytes);
    T* to = in_place ? static_cast<T*>(output.data) + place * output.batch_stride + offset_ : s_.to;
    sum(c, x, d, y, to);
    if (!in_place) runs_.store(to, output, place, offset_, count_);
  }

  void start() {
    in_ = loaded(b_.grad_out, s_.in);
    if (a_.mask.data != nullptr) {
      runs_.product(loaded(a_.mask, s_.to), in_, count_, s_.x);
      std::memcpy(s_.in, s_.x, sizeof s_.in);
      in_ = s_.in;
    }
    original_ = loaded(b_.grad_original, s_.original);
    const bool leaves = b_.grad_left.data != nullptr && writes_history(row_, b_.slots);
    left_ = leaves ? loaded(b_.grad_left, s_.left, int64_t(row_.hist_slot)) : s_.zeros;
    g_ = loaded(a_.gradient, s_.g);
    sum(row_.out_x0, in_, row_.hist_x0, left_, s_.q);
    if (original_ != s_.zeros) sum(T(1), s_.q, T(1), original_, s_.q);
    if (row_.clip - row_.clip == T(0)) keep_unclipped();  // an infinite clip is none
    sum(row_.x0_pred * row_.x0_scale, s_.q, row_.out_pred, in_, s_.dm);
  }

  void keep_unclipped() {
    if (b_.clipped != nullptr) {  // a block begins with a byte
      return runs_.keep_unclipped_bits(b_.clipped + sample_ * clipped_bytes(a_) + offset_ / 8, count_, s_.q);
    }
    const T* m = s_.y;
    if (a_.num_predictions > 1) {
      runs_.guided(a_, weights_, sample_, offset_, count_, s_.y);
    } else if (a_.num_predictions == 1) {
      sum(weights_[0], loaded(a_.predictions[0], s_.p), T(0), s_.zeros, s_.y);
    } else {
      m = s_.zeros;
    }
    runs_.keep_unclipped(row_, loaded(a_.sample, s_.x), m, g_, count_, s_.q);
  }

  void write_sample() {
    if (b_.grad_sample.data == nullptr) return;
    const T of_x0 = row_.x0_sample * row_.x0_scale;
    if (left_ == s_.zeros || row_.hist_sample == T(0)) return write(b_.grad_sample, of_x0, s_.q, row_.out_sample, in_);
    sum(of_x0, s_.q, row_.out_sample, in_, s_.x);
    write(b_.grad_sample, T(1), s_.x, row_.hist_sample, left_);
  }

  void write_predictions() {
    const int count = a_.num_predictions;
    if (b_.grad_predictions != nullptr && count > 0) {
      T first = weights_[0];
      for (int k = 1; k < count; ++k) {
        write(b_.grad_predictions[k], weights_[k], s_.dm, T(0), s_.zeros);
        first -= weights_[k];
      }
      write(b_.grad_predictions[0], first, s_.dm, T(0), s_.zeros);
    }
    if (sums_ == nullptr) return;
    const T* p0 = s_.zeros;
    for (int k = 0; k < count; ++k) {
      const T* p = loaded(a_.predictions[k], k == 0 ? s_.p0 : s_.p);
      sums_[k] += runs_.sum_of_products(s_.dm, p, p0, count_);
      if (k == 0) p0 = p;
    }
  }

  // The gradient, the variance and the noise.
  void write_others() {
    const T *in_sigma = in_, *in_variance = in_;
    if (a_.variance.data != nullptr) {
      runs_.deviations(row_.logvar_base, row_.logvar_span, loaded(a_.variance, s_.p), count_, s_.sigma);
      runs_.product(s_.sigma, in_, count_, s_.in_sigma);
      runs_.product(s_.sigma, s_.in_sigma, count_, s_.in_variance);
      in_sigma = s_.in_sigma, in_variance = s_.in_variance;
    }
    write(b_.grad_noise, row_.out_noise, in_sigma, row_.x0_noise, original_);
    if (b_.grad_variance.data != nullptr) {
      sum(T(0.5) * row_.out_noise, in_sigma, T(0), s_.zeros, s_.x);
      runs_.product(s_.x, loaded(a_.noise, s_.p), count_, s_.x);
      sum(row_.out_var_grad, in_variance, T(0), s_.zeros, s_.y);
      runs_.product(s_.y, g_, count_, s_.y);
      write(b_.grad_variance, row_.logvar_span, s_.x, row_.logvar_span, s_.y);
    }
    if (a_.gradient.data == nullptr && b_.grad_gradient.data == nullptr) return;
    sum(raw_.x0_grad * raw_.x0_scale, s_.q, raw_.out_grad, in_, s_.x);
    if (a_.variance.data != nullptr) sum(T(1), s_.x, raw_.out_var_grad, in_variance, s_.x);
    if (sums_ != nullptr) sums_[weight_columns(a_) - 1] += runs_.sum_of_products(s_.x, g_, s_.zeros, count_);
    write(b_.grad_gradient, scale_, s_.x, T(0), s_.zeros);
  }

  void write_earlier() {
    write(b_.grad_anchor, row_.out_anchor, in_, T(0), s_.zeros);
    for (int slot = 0; slot < b_.slots; ++slot) {
      const T* later = T(slot) == row_.hist_slot ? s_.zeros : loaded(b_.grad_left, s_.p, slot);
      write(b_.grad_history, history_factor(row_, slot), in_, T(1), later, slot);
    }
  }

  const RunFunctions<T>& runs_;
  const StepArguments& a_;
  const BackwardArguments& b_;
  const int64_t sample_;
  double* const sums_;
  Row<T> raw_, row_;  // without the gradient's scale, and with it
  T scale_;
  const T* weights_;
  int64_t offset_ = 0, count_ = 0;
  const T *in_ = nullptr, *original_ = nullptr, *left_ = nullptr, *g_ = nullptr;
  Gradients<T> s_;
};

// Returns the sum of (x' - mean)^2 over some elements of a sample.
template <typename T>
double squares_of(const RunFunctions<T>& runs, const Input& next, int64_t sample, int64_t begin, int64_t end,
                  const T* mean) {
  T loaded[kBlock];
  double total = 0;
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int64_t count = end - offset < kBlock ? end - offset : kBlock;
    const T* values = runs.load(next, sample, offset, count, loaded);
    total += runs.sum_of_squares(values, mean + (offset - begin), count);
  }
  return total;
}

}  // namespace fastguide
