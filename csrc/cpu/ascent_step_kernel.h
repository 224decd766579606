// One ascent step of one impression: x, its gradient and the moments pass through registers once.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

// Bounds repeat along the row with period `tile`, a multiple of the vector width.
struct Bounds {
  const float* low;
  const float* high;
  int64_t tile;
};

struct Noise {
  float scale; // 0: none
  uint64_t seed;
  uint32_t row, step;
  int64_t channels, plane;
  bool channels_last;
};

ZSU_INLINE VF noise_at(const Noise& noise, int64_t i) {
  VF v;
  for (int lane = 0; lane < 16; ++lane) {
    const int64_t element = logical_index(i + lane, noise.channels, noise.plane, noise.channels_last);
    v[lane] = symmetric_uniform(philox(noise.seed, static_cast<uint64_t>(element), noise.row, noise.step));
  }
  return v * noise.scale;
}

ZSU_INLINE float squared_norm(const float* p, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) { // short float sums, added up in double
    const int64_t end = begin + 4096 < n ? begin + 4096 : n;
    VF sums[2] = {VF{}, VF{}};
    int64_t i = begin;
    for (; i + 32 <= end; i += 32)
      for (int k = 0; k < 2; ++k) {
        const VF v = load(p + i + 16 * k);
        sums[k] += v * v;
      }
    for (; i < end; i += 16) {
      const VF v = end - i >= 16 ? load(p + i) : load_part<float>(p + i, end - i, 0.0f);
      sums[0] += v * v;
    }
    total += static_cast<double>(sum_lanes(sums[0] + sums[1]));
  }
  return static_cast<float>(total);
}

// Elements [begin, end) of a row; returns NaN where a gradient or a new x is not finite, else 0.
template <AscentMode mode, bool noisy, bool flagged>
ZSU_INLINE VF ascend(float* x, const float* grad, float* moment, float* variance, int64_t begin, int64_t end,
                     const Bounds& bounds, const AscentRow& row, const Noise& noise) {
  constexpr bool adam = mode == AscentMode::adam;
  const auto ratio = [](VF a, VF b, float eps) ZSU_LAMBDA_INLINE { return ratio_to_root(a, b, eps); };
  VF bad{};
  int64_t tile_at = 0;
  for (int64_t i = begin; i < end; i += 16) {
    const int64_t n = end - i;
    const bool whole = n >= 16;
    const VF at = whole ? load(x + i) : load_part<float>(x + i, n, 0.0f);
    const VF g = whole ? load(grad + i) : load_part<float>(grad + i, n, 0.0f);
    VF m{}, v{};
    if constexpr (adam) {
      m = whole ? load(moment + i) : load_part<float>(moment + i, n, 0.0f);
      v = whole ? load(variance + i) : load_part<float>(variance + i, n, 0.0f);
    }
    VF moved = at + row.lr * ascent_direction<mode>(at, g, m, v, row, ratio);
    if constexpr (noisy) moved += noise_at(noise, i);
    moved = clamp_seeing_nan(moved, load(bounds.low + tile_at), load(bounds.high + tile_at));
    if constexpr (flagged) bad += (g + moved) * 0.0f;
    if (whole) {
      store(x + i, moved);
      if constexpr (adam) {
        store(moment + i, m);
        store(variance + i, v);
      }
    } else {
      store_part(x + i, moved, n);
      if constexpr (adam) {
        store_part(moment + i, m, n);
        store_part(variance + i, v, n);
      }
    }
    tile_at += 16;
    if (tile_at == bounds.tile) tile_at = 0;
  }
  return bad;
}

template <AscentMode mode, bool noisy, bool flagged>
void ascent_row(const AscentRows& a, int64_t index, float* low_tile, float* high_tile, int64_t tile) {
  const int64_t offset = index * a.row_size;
  const float* grad = a.grad + offset;
  const int32_t step = a.step[index] + 1;
  AscentRow row;
  row.lr = a.lr[index * a.lr_stride];
  row.two_beta = 2 * a.beta;
  row.grad_scale = 1;
  if (a.normalize) {
    const float norm = std::sqrt(squared_norm(grad, a.row_size));
    row.grad_scale = norm == 0 ? 0.0f : 1 / norm; // a NaN norm must stay one
  }
  row.beta1 = static_cast<float>(a.beta1);
  row.beta2 = static_cast<float>(a.beta2);
  row.gain1 = static_cast<float>(1 - a.beta1);
  row.gain2 = static_cast<float>(1 - a.beta2);
  // 1 - b^t loses five digits in float at t = 1; expm1 keeps them
  const double correction1 = -std::expm1(step * std::log(a.beta1));
  const double root_correction2 = std::sqrt(-std::expm1(step * std::log(a.beta2)));
  row.unbias = static_cast<float>(root_correction2 / correction1);
  row.eps = static_cast<float>(a.eps * root_correction2);

  const int64_t plane = a.channels > 0 ? a.row_size / a.channels : 0;
  const Noise noise{a.jitter, a.seed, static_cast<uint32_t>(index), static_cast<uint32_t>(step),
                    a.channels, plane, a.channels_last};
  float* x = a.x + offset;
  float* moment = a.moment + offset;
  float* variance = a.variance + offset;
  VF bad{};
  if (a.bounds == 1 || a.channels_last) {
    bad = ascend<mode, noisy, flagged>(x, grad, moment, variance, 0, a.row_size, {low_tile, high_tile, tile}, row, noise);
  } else {
    for (int64_t c = 0; c < a.channels; ++c) {
      store(low_tile, VF{} + a.low[c]);
      store(high_tile, VF{} + a.high[c]);
      bad += ascend<mode, noisy, flagged>(x, grad, moment, variance, c * plane, (c + 1) * plane, {low_tile, high_tile, 16}, row, noise);
    }
  }
  const float any = sum_lanes(bad);
  if (flagged && any != any) a.found_nan[index] = true;
}

using StepRow = void (*)(const AscentRows&, int64_t, float*, float*, int64_t);

template <AscentMode mode>
StepRow choose_row_of_mode(const AscentRows& a) {
  if (a.jitter != 0) return a.found_nan ? ascent_row<mode, true, true> : ascent_row<mode, true, false>;
  return a.found_nan ? ascent_row<mode, false, true> : ascent_row<mode, false, false>;
}

StepRow choose_row(const AscentRows& a) {
  switch (static_cast<AscentMode>(a.mode)) {
    case AscentMode::sgd: return choose_row_of_mode<AscentMode::sgd>(a);
    case AscentMode::sign: return choose_row_of_mode<AscentMode::sign>(a);
    default: return choose_row_of_mode<AscentMode::adam>(a);
  }
}

void ascent_step_rows(const AscentRows& a, int64_t begin, int64_t end) {
  int64_t tile = 16;
  if (a.channels_last && a.bounds > 1) tile = a.bounds % 16 == 0 ? a.bounds : 16 * a.bounds;
  const Scratch<float> scratch(2 * tile);
  float* low = scratch.data;
  float* high = low + tile;
  for (int64_t i = 0; i < tile; ++i) {
    low[i] = a.low[i % a.bounds];
    high[i] = a.high[i % a.bounds];
  }
  const auto step_row = choose_row(a);
  for (int64_t row = begin; row < end; ++row)
    if (a.active[row]) step_row(a, row, low, high, tile);
}

} // namespace zsu::ZSU_ISA
