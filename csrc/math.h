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

enum class AscentMode : int { adam = 0, sgd = 1, sign = 2 };

// What is constant over a row (one impression) during one ascent step.
struct AscentRow {
  float lr;
  float two_beta;         // gradient of beta * ||x||^2 is 2 * beta * x
  float grad_scale;       // 1, or 1 / ||grad|| when gradients are normalised
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

// Direction of the step, and the new moments. `ratio(a, b, eps)` is a / (sqrt(b) + eps) for F.
template <AscentMode mode, class F, class Ratio>
ZSU_INLINE F ascent_direction(F x, F grad, F& moment, F& variance, const AscentRow& row, Ratio ratio) {
  const F g = grad * row.grad_scale - row.two_beta * x;
  if constexpr (mode == AscentMode::sgd) {
    return g;
  } else if constexpr (mode == AscentMode::sign) {
    const F zero = g - g; // 0, and NaN where g is not finite
    return g > 0.0f ? zero + 1.0f : (g < 0.0f ? zero - 1.0f : zero);
  } else {
    moment = row.beta1 * moment + row.gain1 * g;
    variance = row.beta2 * variance + row.gain2 * (g * g);
    return row.unbias * ratio(moment, variance, row.eps);
  }
}

// First word of Philox-4x32-10 (Salmon et al., 2011). The counter is (element, row, step), so the
// noise does not depend on the backend, the block size or the number of threads.
ZSU_INLINE uint32_t philox(uint64_t seed, uint64_t element, uint32_t row, uint32_t step) {
  uint32_t c0 = static_cast<uint32_t>(element), c1 = static_cast<uint32_t>(element >> 32);
  uint32_t c2 = row, c3 = step;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// 24 random bits to [-1, 1), exact in float32.
ZSU_INLINE float symmetric_uniform(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits >> 8) - (1 << 23)) * (1.0f / (1 << 23));
}

// Element index in logical (N, C, ...) order of position `i` in a row stored channels-last.
ZSU_INLINE int64_t logical_index(int64_t i, int64_t channels, int64_t plane, bool channels_last) {
  return channels_last ? (i % channels) * plane + i / channels : i;
}

} // namespace zsu
