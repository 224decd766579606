// The arithmetic that every compiled backend shares: CPU vectors, CPU scalars and CUDA threads all
// instantiate these templates, so what the CPU tests prove holds for the device code too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZSU_INLINE __host__ __device__ __forceinline__
#else
// Never emitted out of line: a copy compiled for AVX-512 must not be what another file links to.
#define ZSU_INLINE static inline __attribute__((always_inline))
#endif

namespace zsu {

// What is constant over a row (one impression) during one ascent step.
struct AscentRow {
  float lr;
  float two_beta;         // gradient of beta * ||x||^2 is 2 * beta * x
  float beta1, beta2;     // Adam's decay rates
  float gain1, gain2;     // 1 - beta1, 1 - beta2, rounded once from double
  // m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) = unbias * m / (sqrt(v) + eps)
  float unbias, eps;
};

// -log(p) of a row whose target is `shifted` <= 0 below the top logit, given log(denominator), where
// denominator = exp(shifted) + rest. A leading target has p = 1 / (1 + rest): the last term is what
// 1 + rest lost by rounding, so that the loss is log1p(rest), without a call to it.
template <class F>
ZSU_INLINE F row_loss(F log_denominator, F shifted, F rest, F denominator) {
  return log_denominator + (shifted == F{} ? (rest - (denominator - 1)) / denominator : -shifted);
}

// Clamp that lets a NaN through: fmin and fmax would turn it into a bound.
template <class F>
ZSU_INLINE F clamp_seeing_nan(F value, F low, F high) {
  value = low > value ? low : value; // this order is what one max instruction does
  return high < value ? high : value;
}

// a * b rounded to F, also where it enters a sum: fused into it, g below would have other bits.
template <class F>
ZSU_INLINE F rounded_product(float a, F b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(a * b);
#else
  return a * b; // clang fuses within an expression only
#endif
}

// Direction of the step, and the new moments. `ratio(a, b, eps)` is a / (sqrt(b) + eps) for F.
template <class F, class Ratio>
ZSU_INLINE F ascent_direction(F x, F grad, F& exp_avg, F& exp_avg_sq, const AscentRow& row, Ratio ratio) {
  const F g = grad - rounded_product(row.two_beta, x);
  exp_avg = row.beta1 * exp_avg + row.gain1 * g;
  exp_avg_sq = row.beta2 * exp_avg_sq + row.gain2 * (g * g);
  return row.unbias * ratio(exp_avg, exp_avg_sq, row.eps);
}

} // namespace zsu
