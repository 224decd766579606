#include "channels_last.h"
#include "dispatch.h"

#include <torch/csrc/stable/library.h>

namespace zsu {
namespace {

Tensor conv_input_gradient(
    const Tensor& grad, const Tensor& weight, int64_t stride, int64_t top, int64_t left, int64_t height,
    int64_t width) {
  check_conv_input_gradient(grad, weight, stride, top, left, height, width);
  ConvInputGradientArgs a{};
  a.kernel_height = weight.size(0);
  a.kernel_width = weight.size(1);
  a.inputs = weight.size(2);
  a.outputs = weight.size(3);
  a.stride = stride;
  a.top = top;
  a.left = left;
  a.height = height;
  a.width = width;
  a.out_height = grad.size(2);
  a.out_width = grad.size(3);
  const Tensor out = empty_channels_last(grad, grad.size(0), a.inputs, height, width, ScalarType::Float);
  if (out.numel() == 0) return out;
  a.grad = grad.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.to = out.mutable_data_ptr<float>();
  const int64_t taps = (a.kernel_height / stride + 1) * (a.kernel_width / stride + 1);
  run_rows(kernels().conv_input_gradient, a, grad.size(0) * height, width * a.inputs * a.outputs * taps);
  return out;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("conv_input_gradient", TORCH_BOX(&zsu::conv_input_gradient));
}
