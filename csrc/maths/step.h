// The mathematics of one element of a guided step: host and device, no torch, no memory access.
//
//   m   = sum_k w_k p_k                                             guidance, anchored at p_0 (see guided_prediction)
//   x0  = clip(x0_scale*(x0_sample*x + x0_pred*m + x0_grad*s*g))    predicted original sample
//   x'  = out_x0*x0 + out_sample*x + out_pred*m
//       + (out_grad + out_var_grad*sigma^2)*s*g + out_noise*sigma*z
//   sigma = exp((logvar_base + logvar_span*v) / 2) with a learned variance v, else 1
//   x'  = mask*x' + (1-mask)*(known_sample*k + known_noise*z_k)     where a part k of x_0 is known, noised to x's level
//   in_scale*x' is the input of the next model call, if it is asked for
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "maths/inline.h"

namespace fastguide {

// A row's coefficients in the order of fastguide.table.ROW_COLUMNS.
enum Column : int {
  x0_scale,
  x0_sample,
  x0_pred,
  x0_grad,
  clip,
  out_x0,
  out_sample,
  out_pred,
  out_grad,
  out_var_grad,
  out_noise,
  logvar_base,
  logvar_span,
  in_scale,
  in_timestep,
  known_sample,
  known_noise,
  num_columns,
};

// What one sample needs for one step: its row, its weights, and the gradient's scale s folded into the row.
template <typename T>
struct Coefficients {
  T x0_scale, x0_sample, x0_pred, x0_grad, clip;
  T out_x0, out_sample, out_pred, out_grad, out_var_grad, out_noise;
  T logvar_base, logvar_span, in_scale, known_sample, known_noise;
  T weight_sum, weight_1;  // of the first two predictions; more are combined beforehand
};

// weights: sum of all w_k, w_1, ..., w_{K-1}, gradient scale; K = num_predictions, and one weight for none.
template <typename T>
FASTGUIDE_INLINE Coefficients<T> coefficients(const T* row, const T* weights, int num_predictions) {
  const T scale = weights[num_predictions > 1 ? num_predictions : 1];
  Coefficients<T> c;
  c.x0_scale = row[Column::x0_scale];
  c.x0_sample = row[Column::x0_sample];
  c.x0_pred = row[Column::x0_pred];
  c.x0_grad = row[Column::x0_grad] * scale;
  c.clip = row[Column::clip];
  c.out_x0 = row[Column::out_x0];
  c.out_sample = row[Column::out_sample];
  c.out_pred = row[Column::out_pred];
  c.out_grad = row[Column::out_grad] * scale;
  c.out_var_grad = row[Column::out_var_grad] * scale;
  c.out_noise = row[Column::out_noise];
  c.logvar_base = row[Column::logvar_base];
  c.logvar_span = row[Column::logvar_span];
  c.in_scale = row[Column::in_scale];
  c.known_sample = row[Column::known_sample];
  c.known_noise = row[Column::known_noise];
  c.weight_sum = weights[0];
  c.weight_1 = num_predictions > 1 ? weights[1] : T(0);
  return c;
}

// exp in one path without branches, so that a loop over it vectorises; exact to 1 unit in the last place.
// Cody-Waite reduction and the minimax polynomial of Cephes' expf; overflow and subnormals as in libm.
FASTGUIDE_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float bounded = x > 89.0f ? 89.0f : (x < -104.0f ? -104.0f : x);
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
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
FASTGUIDE_INLINE T guided_prediction(const Coefficients<T>& c, T p0, T p1) {
  return c.weight_sum * p0 + c.weight_1 * (p1 - p0);
}

template <typename T>
struct StepResult {
  T sample, original;
};

// x sample, m guided prediction, g gradient, v learned variance, z noise; what a flag denies is not used.
template <typename T, bool has_prediction, bool has_gradient, bool has_variance, bool has_noise>
FASTGUIDE_INLINE StepResult<T> step_element(const Coefficients<T>& c, T x, T m, T g, T v, T z) {
  T x0 = c.x0_sample * x;
  if constexpr (has_prediction) x0 += c.x0_pred * m;
  if constexpr (has_gradient) x0 += c.x0_grad * g;
  x0 *= c.x0_scale;                  // after the cancellation of x and m, not before
  x0 = -c.clip > x0 ? -c.clip : x0;  // comparisons in this order let NaN through
  x0 = c.clip < x0 ? c.clip : x0;

  T next = c.out_x0 * x0 + c.out_sample * x;
  if constexpr (has_prediction) next += c.out_pred != T(0) ? c.out_pred * m : T(0);  // m may have overflowed
  if constexpr (has_variance) {
    const T log_variance = c.logvar_base + c.logvar_span * v;
    // Where the variance has no part in the step, it may be anything.
    if constexpr (has_gradient) {
      next += (c.out_grad + (c.out_var_grad != T(0) ? c.out_var_grad * exponential(log_variance) : T(0))) * g;
    }
    if constexpr (has_noise) {
      next += c.out_noise != T(0) ? c.out_noise * exponential(T(0.5) * log_variance) * z : T(0);
    }
  } else {
    if constexpr (has_gradient) next += c.out_grad * g;
    if constexpr (has_noise) next += c.out_noise * z;
  }
  return {next, x0};
}

// The next sample with its known part: where mask is 0 or 1, of one of them alone, whatever the other is.
template <typename T>
FASTGUIDE_INLINE T with_known(const Coefficients<T>& c, T next, T mask, T known, T z) {
  const T level = c.known_sample * known + c.known_noise * z;
  const T blended = mask * next + (T(1) - mask) * level;
  return mask == T(1) ? next : mask == T(0) ? level : blended;
}

}  // namespace fastguide
