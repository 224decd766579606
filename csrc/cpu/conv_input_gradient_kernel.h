// The gradient of the input of a convolution with few inputs, such as an image's, channels-last. It is gathered: for
// each pixel, the sum over the outputs that it contributes to.
#pragma once

#include "reach.h"
#include "simd.h"

namespace zsu::ZSU_ISA {

// `pixels` pixels, a stride apart, of all inputs; x is the reach of the first one, and the others' are as long. All
// products of one output channel are in one lane of a sum until the end.
template <int inputs, int pixels>
ZSU_INLINE void pixels_of_row(
    const ConvInputGradientArgs& a, const Reach& y, const Reach& x, const float* grad, float* to) {
  VF sums[pixels][inputs] = {};
  for (int64_t i = y.first, k = y.index; i <= y.last; ++i, k -= a.stride)
    for (int64_t j = x.first, l = x.index; j <= x.last; ++j, l -= a.stride) {
      const float* from = grad + (i * a.out_width + j) * a.outputs;
      const float* weight = a.weight + (k * a.kernel_width + l) * inputs * a.outputs;
      const auto add = [&](auto whole, int64_t o) ZSU_LAMBDA_INLINE {
        VF w[inputs];
        ZSU_UNROLL
        for (int n = 0; n < inputs; ++n) w[n] = load_values<whole()>(weight + n * a.outputs + o, a.outputs - o);
        ZSU_UNROLL
        for (int p = 0; p < pixels; ++p) {
          const VF g = load_values<whole()>(from + p * a.outputs + o, a.outputs - o);
          ZSU_UNROLL
          for (int n = 0; n < inputs; ++n) sums[p][n] += g * w[n];
        }
      };
      int64_t o = 0;
      for (; o + lanes <= a.outputs; o += lanes) add(std::true_type{}, o);
      if (o < a.outputs) add(std::false_type{}, o);
    }
  ZSU_UNROLL
  for (int p = 0; p < pixels; ++p)
    ZSU_UNROLL
    for (int n = 0; n < inputs; ++n) to[p * a.stride * inputs + n] = sum_lanes(sums[p][n]);
}

template <int inputs>
void inputs_row(const ConvInputGradientArgs& a, const Reach& y, const float* grad, float* to) {
  constexpr int most = 4; // sums and weights fit into 16 registers
  for (int64_t phase = 0; phase < a.stride; ++phase) {
    for (int64_t column = phase; column < a.width;) {
      const Reach x = reach(column + a.left, a.kernel_width, a.stride, a.out_width);
      const int64_t end = column + (most - 1) * a.stride;
      const Reach last = reach(end + a.left, a.kernel_width, a.stride, a.out_width);
      float* pixel = to + column * inputs;
      if (end < a.width && last.index == x.index && last.last - x.last == most - 1) {
        pixels_of_row<inputs, most>(a, y, x, grad, pixel);
        column += most * a.stride;
      } else {
        pixels_of_row<inputs, 1>(a, y, x, grad, pixel);
        column += a.stride;
      }
    }
  }
}

// Rows of the input, counted over all images.
void conv_input_gradient_kernel(const ConvInputGradientArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / a.height;
    const Reach y = reach(row % a.height + a.top, a.kernel_height, a.stride, a.out_height);
    const float* grad = a.grad + image * a.out_height * a.out_width * a.outputs;
    float* to = a.to + row * a.width * a.inputs;
    if (a.inputs == 1) inputs_row<1>(a, y, grad, to);
    else if (a.inputs == 2) inputs_row<2>(a, y, grad, to);
    else if (a.inputs == 3) inputs_row<3>(a, y, grad, to);
    else inputs_row<4>(a, y, grad, to);
  }
}

} // namespace zsu::ZSU_ISA
