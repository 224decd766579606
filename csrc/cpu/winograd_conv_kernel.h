// Convolutions of 3x3 by Winograd's minimal filtering F(4x4, 3x3), with interpolation points 0, 1, -1, 2, -2 and
// infinity (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, section 4.3). A tile of 4x4
// outputs needs 36 multiplications per pair of channels instead of 144. Each of its 36 positions is multiplied as
// one matrix: tiles by input channels, times input by output channels.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

#if defined(ZSU_AVX512)
constexpr int64_t product_rows = 6, product_columns = 4;
#elif defined(ZSU_F16C)
constexpr int64_t product_rows = 6, product_columns = 2;
#elif defined(ZSU_NEON)
constexpr int64_t product_rows = 6, product_columns = 4;
#else
constexpr int64_t product_rows = 6, product_columns = 2;
#endif
constexpr int64_t few_rows = 2; // of the products that remain

ZSU_INLINE int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- transforms ----------------------------------------------------------------------------------
// B^T d and A^T m of the paper, for six vectors.
ZSU_INLINE void transform_inputs(const VF (&d)[6], VF (&t)[6]) {
  const VF even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const VF inner = d[4] - d[2], outer = 2.0f * (d[3] - d[1]);
  t[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = inner + outer;
  t[4] = inner - outer;
  t[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}
ZSU_INLINE void transform_products(const VF (&m)[6], VF (&y)[4]) {
  const VF sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const VF sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = m[0] + sum1 + sum2;
  y[1] = difference1 + 2.0f * difference2;
  y[2] = sum1 + 4.0f * sum2;
  y[3] = difference1 + 8.0f * difference2 + m[5];
}

// Where a tile lies: its image, and its first row and column of outputs.
struct Tile {
  int64_t image, row, column;
};
ZSU_INLINE Tile tile_at(const WinogradConvArgs& a, int64_t index) {
  const int64_t line = index / a.tile_columns;
  return {line / a.tile_rows, line % a.tile_rows * 4, index % a.tile_columns * 4};
}

// B^T d B of some channels of a tile, which start at c: position p goes to to[p * stride].
template <bool whole>
ZSU_INLINE void transform_input_lanes(
    const float* const (&pixels)[6][6], int64_t c, int64_t n, float* to, int64_t stride, int64_t next) {
  VF half[6][6];
  ZSU_UNROLL
  for (int j = 0; j < 6; ++j) {
    VF d[6], t[6];
    ZSU_UNROLL
    for (int i = 0; i < 6; ++i) {
      d[i] = load_values<whole>(pixels[i][j] + c, n);
      if (j > 1) __builtin_prefetch(pixels[i][j] + c + next); // the next tile's
    }
    transform_inputs(d, t);
    ZSU_UNROLL
    for (int i = 0; i < 6; ++i) half[i][j] = t[i];
  }
  ZSU_UNROLL
  for (int i = 0; i < 6; ++i) {
    VF t[6];
    transform_inputs(half[i], t);
    ZSU_UNROLL
    for (int j = 0; j < 6; ++j) store(to + (6 * i + j) * stride + c, t[j]);
  }
}

// The same for all channels. Pixels outside the image are read from `zeros`.
void transform_input_tile(const WinogradConvArgs& a, const Tile& tile, const float* zeros, float* to, int64_t stride) {
  const float* pixels[6][6];
  for (int64_t i = 0; i < 6; ++i) {
    const int64_t row = tile.row + i - a.padding;
    for (int64_t j = 0; j < 6; ++j) {
      const int64_t column = tile.column + j - a.padding;
      const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
      pixels[i][j] = inside ? a.x + ((tile.image * a.height + row) * a.width + column) * a.inputs : zeros;
    }
  }
  const int64_t next = 4 * a.inputs;
  int64_t c = 0;
  for (; c + lanes <= a.inputs; c += lanes) transform_input_lanes<true>(pixels, c, lanes, to, stride, next);
  if (c < a.inputs) transform_input_lanes<false>(pixels, c, a.inputs - c, to, stride, next);
}

// A^T m A of some outputs of a tile, with bias, `other` and activation, to the pixels that are not null.
template <bool whole>
ZSU_INLINE void transform_output_lanes(
    const WinogradConvArgs& a, float* const (&pixels)[4][4], VF bias, int64_t c, int64_t n, const float* from,
    int64_t stride) {
  const VF low = VF{} + a.low, high = VF{} + a.high;
  VF half[4][6];
  ZSU_UNROLL
  for (int j = 0; j < 6; ++j) {
    VF m[6], y[4];
    ZSU_UNROLL
    for (int i = 0; i < 6; ++i) m[i] = load(from + (6 * i + j) * stride + c);
    transform_products(m, y);
    ZSU_UNROLL
    for (int i = 0; i < 4; ++i) half[i][j] = y[i];
  }
  ZSU_UNROLL
  for (int i = 0; i < 4; ++i) {
    VF y[4];
    transform_products(half[i], y);
    ZSU_UNROLL
    for (int j = 0; j < 4; ++j) {
      float* to = pixels[i][j];
      if (!to) continue;
      VF sum = y[j] + bias;
      if (a.other) sum += load_values<whole>(a.other + (to - a.out) + c, n);
      store_values<whole>(to + c, clamp_keeping_nan<VF>(sum, low, high), n);
    }
  }
}

// The same for all outputs. Pixels beyond the edge of the image are dropped.
void transform_output_tile(
    const WinogradConvArgs& a, const Tile& tile, const float* bias, const float* from, int64_t stride) {
  float* out = a.out + ((tile.image * a.out_height + tile.row) * a.out_width + tile.column) * a.outputs;
  float* pixels[4][4];
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const bool inside = tile.row + i < a.out_height && tile.column + j < a.out_width;
      pixels[i][j] = inside ? out + (i * a.out_width + j) * a.outputs : nullptr;
    }
  int64_t c = 0;
  for (; c + lanes <= a.outputs; c += lanes)
    transform_output_lanes<true>(a, pixels, load(bias + c), c, lanes, from, stride);
  if (c < a.outputs) transform_output_lanes<false>(a, pixels, load(bias + c), c, a.outputs - c, from, stride);
}

// ---- products ------------------------------------------------------------------------------------
// `rows` rows of v times `columns` registers of each of a block's rows.
template <int64_t rows, int64_t columns>
ZSU_INLINE void multiply_tile(
    const float* v, int64_t v_stride, const float* weight, int64_t block, int64_t inputs, float* m, int64_t m_stride) {
  VF sum[rows][columns] = {};
  for (int64_t k = 0; k < inputs; ++k, weight += block) {
    VF w[columns];
    ZSU_UNROLL
    for (int64_t c = 0; c < columns; ++c) w[c] = load(weight + c * lanes);
    ZSU_UNROLL
    for (int64_t r = 0; r < rows; ++r) {
      const VF value = VF{} + v[r * v_stride + k];
      ZSU_UNROLL
      for (int64_t c = 0; c < columns; ++c) sum[r][c] += value * w[c];
    }
  }
  ZSU_UNROLL
  for (int64_t r = 0; r < rows; ++r)
    ZSU_UNROLL
    for (int64_t c = 0; c < columns; ++c) store(m + r * m_stride + c * lanes, sum[r][c]);
}

// The product of one position: `count` rows, and up to few_rows - 1 more, times all blocks of weights.
template <int64_t columns>
void multiply(
    const WinogradConvArgs& a, int64_t count, const float* v, int64_t v_stride, const float* weight, float* m,
    int64_t m_stride) {
  constexpr int64_t sums = product_rows * product_columns, most = sums / columns < 12 ? sums / columns : 12;
  for (int64_t start = 0; start < m_stride; start += a.block, weight += a.inputs * a.block) {
    for (int64_t c = 0; c < a.block; c += columns * lanes) {
      int64_t row = 0;
      for (; row + most <= count; row += most)
        multiply_tile<most, columns>(
            v + row * v_stride, v_stride, weight + c, a.block, a.inputs, m + row * m_stride + start + c, m_stride);
      for (; row < count; row += few_rows)
        multiply_tile<few_rows, columns>(
            v + row * v_stride, v_stride, weight + c, a.block, a.inputs, m + row * m_stride + start + c, m_stride);
    }
  }
}

using Multiply = void (*)(const WinogradConvArgs&, int64_t, const float*, int64_t, const float*, float*, int64_t);
ZSU_INLINE Multiply multiply_for(int64_t block) {
#if defined(ZSU_AVX512)
  if (block == 16) return multiply<1>;
  if (block == 32) return multiply<2>;
  if (block == 48) return multiply<3>;
#endif
  return multiply<product_columns>;
}

// Runs chunks [begin, end) of a.chunk tiles each.
void winograd_conv_kernel(const WinogradConvArgs& a, int64_t begin, int64_t end) {
  const int64_t v_stride = rounded_up(a.inputs, 16), m_stride = a.blocks * a.block, most = a.chunk + few_rows;
  // 16 more: the 36 positions of a tile would otherwise compete for the same lines of the cache
  const int64_t v_size = most * v_stride + 16, m_size = most * m_stride + 16;
  const Scratch<float> scratch(36 * (v_size + m_size) + v_stride + m_stride + 16);
  float* v = scratch.data + (64 - reinterpret_cast<uintptr_t>(scratch.data) % 64) % 64 / 4;
  float* m = v + 36 * v_size;
  float* zeros = m + 36 * m_size;
  float* bias = zeros + v_stride;
  for (int64_t i = 0; i < v_stride; ++i) zeros[i] = 0;
  for (int64_t i = 0; i < m_stride; ++i) bias[i] = a.bias && i < a.outputs ? a.bias[i] : 0;
  const Multiply product = multiply_for(a.block);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * a.chunk, count = a.tiles - first < a.chunk ? a.tiles - first : a.chunk;
    for (int64_t t = 0; t < count; ++t)
      transform_input_tile(a, tile_at(a, first + t), zeros, v + t * v_stride, v_size);
    for (int64_t p = 0; p < 36; ++p) {
      for (int64_t i = count * v_stride; i < rounded_up(count, few_rows) * v_stride; ++i) v[p * v_size + i] = 0;
      const float* weight = a.weight + p * a.blocks * a.inputs * a.block;
      product(a, count, v + p * v_size, v_stride, weight, m + p * m_size, m_stride);
    }
    for (int64_t t = 0; t < count; ++t)
      transform_output_tile(a, tile_at(a, first + t), bias, m + t * m_stride, m_size);
  }
}

} // namespace zsu::ZSU_ISA
