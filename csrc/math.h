// The arithmetic that all compiled backends share. CPU vectors, CPU scalars and CUDA threads instantiate
// the same templates, so the CPU tests cover the formulas of the device code too. On the CPU it is
// compiled once per instruction set, hence included after the target pragma of an isa_*.cpp only.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZSU_INLINE __host__ __device__ __forceinline__
#else
// Never emitted out of line: the linker could pick the copy compiled for AVX-512 for every file.
#define ZSU_INLINE static inline __attribute__((always_inline))
#endif

namespace zsu {

// The constants of one row during one ascent step.
struct AscentRow {
  float lr;
  float two_beta;     // the gradient of beta * ||x||^2 is 2 * beta * x
  float beta1, beta2; // Adam's decay rates
  float gain1, gain2; // 1 - beta1, 1 - beta2, rounded once from double
  // m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) = unbias * m / (sqrt(v) + eps)
  float unbias, eps;
};

// -log(p) of a row whose target is `shifted` <= 0 below the largest logit, given log(denominator), where
// denominator = exp(shifted) + rest. If the target is the largest, p = 1 / (1 + rest): the last term
// restores what 1 + rest lost by rounding, which makes the loss log1p(rest) without calling it.
template <class F>
ZSU_INLINE F row_loss(F log_denominator, F shifted, F rest, F denominator) {
  return log_denominator + (shifted == F{} ? (rest - (denominator - 1)) / denominator : -shifted);
}

// Clamps and keeps NaN: fmin and fmax would turn it into a bound.
template <class F>
ZSU_INLINE F clamp_keeping_nan(F value, F low, F high) {
  value = low > value ? low : value; // in this order it is one max instruction
  return high < value ? high : value;
}

// a * b rounded to F. Fused into the sum that follows, it would change the bits of the result.
template <class F>
ZSU_INLINE F rounded_product(float a, F b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(a * b);
#else
  return a * b; // clang fuses within one expression only
#endif
}

// Updates the moments and returns the direction of the step. `ratio(a, b, eps)` is a / (sqrt(b) + eps).
template <class F, class Ratio>
ZSU_INLINE F ascent_direction(F x, F grad, F& exp_avg, F& exp_avg_sq, const AscentRow& row, Ratio ratio) {
  const F g = grad - rounded_product(row.two_beta, x);
  exp_avg = row.beta1 * exp_avg + row.gain1 * g;
  exp_avg_sq = row.beta2 * exp_avg_sq + row.gain2 * (g * g);
  return row.unbias * ratio(exp_avg, exp_avg_sq, row.eps);
}

} // namespace zsu
