// A convolution without stride of blocks of 16 images, which are the lanes of its vectors, so that these are full
// whatever the number of channels.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

constexpr int block_images = 16;
static_assert(block_images % lanes == 0);
#if defined(ZSU_AVX512) || defined(ZSU_NEON)
constexpr int blocked_sums = 24; // of 32 registers
#else
constexpr int blocked_sums = 12; // of 16
#endif
alignas(64) static constexpr float beyond_input[block_images] = {};

// Pixels at once for that many outputs; sums, pixels and a weight are in registers.
constexpr int pixels_at_once(int outputs) {
  const int most = outputs == 3 && blocked_sums == 12 ? 3 : blocked_sums / outputs;
  return most < 8 ? most : 8;
}

// `pixels` pixels of a row of the output, from `column` on, of `outputs` channels and of the images of one vector.
// `edge`: whether some windows may reach beyond the input's left or right end.
template <int outputs, int pixels, bool edge>
ZSU_INLINE void convolve(
    const BlockedConvArgs& a, const float* x, const float* weights, const float* bias, float* to, int64_t row,
    int64_t column) {
  VF sums[outputs][pixels];
  for (int o = 0; o < outputs; ++o)
    for (int p = 0; p < pixels; ++p) sums[o][p] = VF{} + (bias ? bias[o] : 0.0f);
  const int64_t first_row = row < a.top ? a.top - row : 0, below = a.height + a.top - row;
  const int64_t end_row = below < a.kernel_height ? below : a.kernel_height;
  int64_t first = 0, end = a.kernel_width;
  if (edge) {
    const int64_t before = a.left - column - (pixels - 1), right = a.width + a.left - column;
    if (before > first) first = before;
    if (right < end) end = right;
  }
  for (int64_t i = 0; i < a.inputs; ++i)
    for (int64_t k = first_row; k < end_row; ++k) {
      const float* from = x + (i * a.height + row + k - a.top) * a.width * block_images;
      const float* weight = weights + (i * a.kernel_height + k) * a.kernel_width * a.outputs;
      for (int64_t l = first; l < end; ++l) {
        VF values[pixels];
        ZSU_UNROLL
        for (int p = 0; p < pixels; ++p) {
          const int64_t at = column + p + l - a.left;
          const bool inside = !edge || static_cast<uint64_t>(at) < static_cast<uint64_t>(a.width);
          values[p] = load(inside ? from + at * block_images : beyond_input);
        }
        ZSU_UNROLL
        for (int o = 0; o < outputs; ++o) {
          const VF w = weight[l * a.outputs + o] - VF{}; // x + 0 would be an addition, as -0 + 0 is 0
          ZSU_UNROLL
          for (int p = 0; p < pixels; ++p) sums[o][p] += w * values[p];
        }
      }
    }
  for (int o = 0; o < outputs; ++o)
    for (int p = 0; p < pixels; ++p)
      store(to + ((o * a.out_height + row) * a.out_width + column + p) * block_images, sums[o][p]);
}

// The last `n` pixels of a row, n <= most.
template <int outputs, int most>
ZSU_INLINE void convolve_last(
    const BlockedConvArgs& a, const float* x, const float* weights, const float* bias, float* to, int64_t row, int64_t n) {
  if constexpr (most > 0) {
    if (n == most) convolve<outputs, most, true>(a, x, weights, bias, to, row, a.out_width - n);
    else convolve_last<outputs, most - 1>(a, x, weights, bias, to, row, n);
  }
}

template <int outputs>
void convolve_row(
    const BlockedConvArgs& a, const float* x, const float* weights, const float* bias, float* to, int64_t row) {
  constexpr int pixels = pixels_at_once(outputs);
  int64_t column = 0;
  for (; column + pixels <= a.out_width; column += pixels) {
    const bool inside = column >= a.left && column + pixels + a.kernel_width - 2 - a.left < a.width;
    for (int image = 0; image < block_images; image += lanes)
      if (inside) convolve<outputs, pixels, false>(a, x + image, weights, bias, to + image, row, column);
      else convolve<outputs, pixels, true>(a, x + image, weights, bias, to + image, row, column);
  }
  for (int image = 0; image < block_images; image += lanes)
    convolve_last<outputs, pixels - 1>(a, x + image, weights, bias, to + image, row, a.out_width - column);
}

// Rows of the output, counted over all blocks.
void blocked_conv_kernel(const BlockedConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = i / a.out_height, row = i % a.out_height;
    const float* x = a.x + block * a.inputs * a.height * a.width * block_images;
    for (int64_t o = 0; o < a.outputs;) {
      const int64_t left = a.outputs - o;
      const float* weights = a.weight + o;
      const float* bias = a.bias ? a.bias + o : nullptr;
      float* to = a.out + (block * a.outputs + o) * a.out_height * a.out_width * block_images;
      if (left == 1) convolve_row<1>(a, x, weights, bias, to, row);
      else if (left == 2) convolve_row<2>(a, x, weights, bias, to, row);
      else if (left == 3 || left == 6) convolve_row<3>(a, x, weights, bias, to, row);
      else convolve_row<4>(a, x, weights, bias, to, row);
      o += left == 6 ? 3 : left < 4 ? left : 4;
    }
  }
}

} // namespace zsu::ZSU_ISA
