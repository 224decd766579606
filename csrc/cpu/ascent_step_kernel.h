// One ascent step per impression: x, its gradient and the moments pass through registers once.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

// Bounds repeat along the row with period `tile`, a multiple of the vector width.
struct Bounds {
  const float* low;
  const float* high;
  int64_t tile;
};

// Steps elements [begin, end) of a row.
ZSU_INLINE void step_range(float* x, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t begin, int64_t end,
                           const Bounds& bounds, const AscentRow& row) {
  const auto ratio = [](VF a, VF b, float eps) ZSU_LAMBDA_INLINE { return ratio_to_root(a, b, eps); };
  int64_t tile_at = 0;
  for (int64_t i = begin; i < end; i += lanes) {
    const int64_t n = end - i;
    const bool full = n >= lanes;
    const auto read = [&](const float* p) ZSU_LAMBDA_INLINE { return full ? load(p + i) : load_part<float>(p + i, n, 0.0f); };
    const auto write = [&](float* p, VF v) ZSU_LAMBDA_INLINE { full ? store(p + i, v) : store_part(p + i, v, n); };
    const VF at = read(x), g = read(grad);
    VF m = read(exp_avg), v = read(exp_avg_sq);
    const VF moved = at + row.lr * ascent_direction(at, g, m, v, row, ratio);
    write(x, clamp_keeping_nan(moved, load(bounds.low + tile_at), load(bounds.high + tile_at)));
    write(exp_avg, m);
    write(exp_avg_sq, v);
    tile_at += lanes;
    if (tile_at == bounds.tile) tile_at = 0;
  }
}

ZSU_INLINE AscentRow ascent_row(const AscentStepArgs& a, int64_t index) {
  const int32_t step = a.step[index] + 1;
  AscentRow row;
  row.lr = a.lr[index * a.lr_stride];
  row.two_beta = 2 * *a.beta;
  row.beta1 = static_cast<float>(a.beta1);
  row.beta2 = static_cast<float>(a.beta2);
  row.gain1 = static_cast<float>(1 - a.beta1);
  row.gain2 = static_cast<float>(1 - a.beta2);
  // 1 - b^t loses five digits in float at t = 1; expm1 keeps them
  const double correction1 = -std::expm1(step * std::log(a.beta1));
  const double root_correction2 = std::sqrt(-std::expm1(step * std::log(a.beta2)));
  row.unbias = static_cast<float>(root_correction2 / correction1);
  row.eps = static_cast<float>(a.eps * root_correction2);
  return row;
}

// Steps one row. `low` and `high` hold the bounds of a whole tile; where bounds differ per channel of a
// contiguous row, they are overwritten.
void step_row(const AscentStepArgs& a, int64_t index, float* low, float* high, int64_t tile) {
  const AscentRow row = ascent_row(a, index);
  const int64_t offset = index * a.row_size;
  float* x = a.x + offset;
  const float* grad = a.grad + offset;
  float* exp_avg = a.exp_avg + offset;
  float* exp_avg_sq = a.exp_avg_sq + offset;
  if (a.bounds == 1 || a.channels_last) {
    step_range(x, grad, exp_avg, exp_avg_sq, 0, a.row_size, {low, high, tile}, row);
    return;
  }
  const int64_t plane = a.channels > 0 ? a.row_size / a.channels : 0;
  for (int64_t c = 0; c < a.channels; ++c) {
    store(low, VF{} + a.low[c]);
    store(high, VF{} + a.high[c]);
    step_range(x, grad, exp_avg, exp_avg_sq, c * plane, (c + 1) * plane, {low, high, lanes}, row);
  }
}

void ascent_step_kernel(const AscentStepArgs& a, int64_t begin, int64_t end) {
  int64_t tile = lanes;
  if (a.channels_last && a.bounds > 1) tile *= a.bounds;
  const Scratch<float> scratch(2 * tile);
  float* low = scratch.data;
  float* high = low + tile;
  for (int64_t i = 0; i < tile; ++i) {
    low[i] = a.low[i % a.bounds];
    high[i] = a.high[i % a.bounds];
  }
  for (int64_t row = begin; row < end; ++row)
    if (a.active[row]) step_row(a, row, low, high, tile);
}

} // namespace zsu::ZSU_ISA
