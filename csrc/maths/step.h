// The mathematics of one element of a guided step: host and device, no torch, no memory access.
//
//   m   = sum_k w_k p_k                                             guidance, anchored at p_0 (see guided_prediction)
//   x0  = clip(x0_scale*(x0_sample*x + x0_pred*m + x0_grad*s*g))    predicted original sample
//         with a quantile: x0 = clip(x0 / s), where s is that of |x0| over the sample, limited to [1, clip]
//   x'  = out_x0*x0 + out_sample*x + out_pred*m
//       + (out_grad + out_var_grad*sigma^2)*s*g + out_noise*sigma*z
//         + out_anchor*x_a + sum_h out_hist_h*H_h                   x_a: what x was before the caller changed it
//   H[hist_slot] = hist_x0*x0 + hist_sample*x                       after the step has read the history
//   sigma = exp((logvar_base + logvar_span*v) / 2) with a learned variance v, else 1
//   x'  = mask*x' + (1-mask)*(known_sample*k + known_noise*z_k)     where a part k of x_0 is known, noised to x's level
//   in_scale*x' is the input of the next model call
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "maths/inline.h"

namespace fastguide {

// X(name) for each coefficient of a row, in the order of fastguide.solvers.table.ROW_COLUMNS: the loader compares them.
#define FASTGUIDE_ROW(X) \
  X(x0_scale) \
  X(x0_sample) \
  X(x0_pred) \
  X(x0_grad) \
  X(clip) \
  X(out_x0) \
  X(out_sample) \
  X(out_pred) \
  X(out_grad) \
  X(out_var_grad) \
  X(out_noise) \
  X(logvar_base) \
  X(logvar_span) \
  X(in_scale) \
  X(in_timestep) \
  X(known_sample) \
  X(known_noise) \
  X(out_anchor) \
  X(out_hist_0) \
  X(out_hist_1) \
  X(out_hist_2) \
  X(hist_slot) \
  X(hist_x0) \
  X(hist_sample) \
  X(x0_noise) \
  X(quantile)

// The coefficients of one step, as they are in memory.
template <typename T>
struct Row {
#define FASTGUIDE_FIELD(name) T name;
  FASTGUIDE_ROW(FASTGUIDE_FIELD)
#undef FASTGUIDE_FIELD
};

#define FASTGUIDE_COUNT(name) +1
constexpr int kRowColumns = 0 FASTGUIDE_ROW(FASTGUIDE_COUNT);
#undef FASTGUIDE_COUNT
static_assert(sizeof(Row<float>) == kRowColumns * sizeof(float), "a table's rows follow each other without a gap");
static_assert(sizeof(Row<double>) == kRowColumns * sizeof(double), "a table's rows follow each other without a gap");

// The row with the gradient's scale s folded into it.
template <typename T>
FASTGUIDE_INLINE Row<T> with_gradient_scale(const Row<T>& row, T s) {
  Row<T> scaled = row;
  scaled.x0_grad *= s;
  scaled.out_grad *= s;
  scaled.out_var_grad *= s;
  return scaled;
}

// A sample's weights are the sum of all w_k, w_1, ..., w_{K-1}, and the gradient's scale; a step without predictions
// has one weight, which is not used.
template <typename T>
FASTGUIDE_INLINE T gradient_scale(const T* weights, int num_predictions) {
  return weights[num_predictions > 1 ? num_predictions : 1];
}

// The weights of at most two predictions; more are combined beforehand.
template <typename T>
struct PairWeights {
  T sum, w1;
};

template <typename T>
FASTGUIDE_INLINE PairWeights<T> pair_weights(const T* weights, int num_predictions) {
  return {weights[0], num_predictions > 1 ? weights[1] : T(0)};
}

// a * b + c, rounded once where the processor can: the formulas below say where, and no compiler chooses. An element's
// bits then depend neither on its place nor on what else a step does.
template <typename T>
FASTGUIDE_INLINE T fused(T a, T b, T c) {
#if defined(FASTGUIDE_HAS_FMA)
  if constexpr (sizeof(T) == sizeof(float)) return fmaf(a, b, c);
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The row with w_x folded into it: the guided prediction is m + w_x*x.
template <typename T>
FASTGUIDE_INLINE Row<T> with_sample_weight(const Row<T>& row, T weight) {
  Row<T> weighed = row;
  weighed.x0_sample = fused(row.x0_pred, weight, row.x0_sample);
  if (row.out_pred != T(0)) weighed.out_sample = fused(row.out_pred, weight, row.out_sample);
  return weighed;
}

// The row of a sample whose x0 is divided by a threshold, and limited to 1: dynamic thresholding (Saharia et al. 2022,
// section 2.3).
template <typename T>
FASTGUIDE_INLINE Row<T> with_threshold(const Row<T>& row, T inverse_threshold) {
  Row<T> limited = row;
  if (row.quantile > T(0)) {
    limited.x0_scale *= inverse_threshold;
    limited.clip = T(1);
  }
  return limited;
}

// exp without branches, so that a loop over it vectorises; exact to 1 unit in the last place. Cody-Waite reduction and
// the minimax polynomial of Cephes' expf; overflow and subnormals as in libm.
FASTGUIDE_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float bounded = x > 89.0f ? 89.0f : (x < -104.0f ? -104.0f : x);
  const float shifted = fused(bounded, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, bounded));
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p * r, r, r) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t exponent = int32_t(bits - 0x4B400000u);  // the integer n; of NaN, any
  const int32_t half = exponent >> 1;                    // 2^n in two factors, as n may be outside of float's exponents
  const uint32_t low = uint32_t(half + 127) << 23, high = uint32_t(exponent - half + 127) << 23;
  float scale_low, scale_high;
  std::memcpy(&scale_low, &low, sizeof low);
  std::memcpy(&scale_high, &high, sizeof high);
  return p * scale_low * scale_high;
#endif
}

FASTGUIDE_INLINE double exponential(double x) { return ::exp(x); }

// p_0 and p_1 nearly agree, and their difference is exact: it keeps what (1 - s)*p_0 + s*p_1 rounds away.
template <typename T>
FASTGUIDE_INLINE T guided_prediction(const PairWeights<T>& weights, T p0, T p1) {
  return fused(weights.w1, p1 - p0, weights.sum * p0);
}

// Limits a value to [-limit, limit], and lets NaN through.
template <typename T>
FASTGUIDE_INLINE T clipped(T value, T limit) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(value), "f"(-limit));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(value), "f"(limit));
    return value;
  }
#endif
  value = -limit > value ? -limit : value;  // comparisons in this order let NaN through
  return limit < value ? limit : value;
}

// In these, c has the gradient's scale in it; x is the sample, m the guided prediction, g the gradient, v the learned
// variance and z the noise. What a flag denies is not used.

// Returns x0 before it is clipped. It is scaled after the cancellation of x and m.
template <typename T, bool has_prediction, bool has_gradient>
FASTGUIDE_INLINE T unclipped_original(const Row<T>& c, T x, T m, T g) {
  T x0 = c.x0_sample * x;
  if constexpr (has_prediction) x0 = fused(c.x0_pred, m, x0);
  if constexpr (has_gradient) x0 = fused(c.x0_grad, g, x0);
  return c.x0_scale * x0;
}

// Returns x', before a known part is put into it.
template <typename T, bool has_prediction, bool has_gradient, bool has_variance, bool has_noise>
FASTGUIDE_INLINE T next_sample(const Row<T>& c, T x0, T x, T m, T g, T v, T z) {
  T next = fused(c.out_x0, x0, c.out_sample * x);
  if constexpr (has_prediction) next = c.out_pred != T(0) ? fused(c.out_pred, m, next) : next;  // m may have overflowed
  if constexpr (has_variance) {
    const T log_variance = fused(c.logvar_span, v, c.logvar_base);
    // Where the variance has no part in the step, it may be anything.
    if constexpr (has_gradient) {
      const T variance_scale = fused(c.out_var_grad, exponential(log_variance), c.out_grad);
      next = fused(c.out_var_grad != T(0) ? variance_scale : c.out_grad, g, next);
    }
    if constexpr (has_noise) {
      const T noise_scale = c.out_noise * exponential(T(0.5) * log_variance);
      next = c.out_noise != T(0) ? fused(noise_scale, z, next) : next;
    }
  } else {
    if constexpr (has_gradient) next = fused(c.out_grad, g, next);
    if constexpr (has_noise) next = fused(c.out_noise, z, next);
  }
  return next;
}

// The most slots of a history.
constexpr int kMaxSlots = 3;

template <typename T>
FASTGUIDE_INLINE T history_factor(const Row<T>& c, int slot) {
  return slot == 0 ? c.out_hist_0 : slot == 1 ? c.out_hist_1 : c.out_hist_2;
}

// Whether a step leaves something in one of the history's slots.
template <typename T>
FASTGUIDE_INLINE bool writes_history(const Row<T>& c, int slots) {
  return c.hist_slot >= T(0) && c.hist_slot < T(slots);
}

// What a step leaves in the history for later ones.
template <typename T>
FASTGUIDE_INLINE T history_entry(const Row<T>& c, T x0, T x) {
  return c.hist_sample != T(0) ? fused(c.hist_sample, x, c.hist_x0 * x0) : c.hist_x0 * x0;
}

// Puts the known part into the next sample. Where the mask is 0 or 1, only one of the two counts, even if the other is
// not finite.
template <typename T>
FASTGUIDE_INLINE T with_known(const Row<T>& c, T next, T mask, T known, T z) {
  const T level = fused(c.known_sample, known, c.known_noise * z);
  const T blended = fused(mask, next, (T(1) - mask) * level);
  return mask == T(1) ? next : mask == T(0) ? level : blended;
}

}  // namespace fastguide
