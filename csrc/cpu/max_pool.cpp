#include "channels_last.h"
#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

std::tuple<Tensor, Tensor> max_pool(
    const Tensor& x, int64_t kernel, int64_t stride, int64_t padding, int64_t out_height, int64_t out_width, bool relu) {
  check_max_pool(x, kernel, stride, padding, out_height, out_width);
  MaxPoolArgs a{};
  a.x = x.const_data_ptr();
  a.channels = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.out_height = out_height;
  a.out_width = out_width;
  a.kernel = kernel;
  a.stride = stride;
  a.padding = padding;
  a.relu = relu;
  const Tensor out = empty_channels_last(x, x.size(0), a.channels, out_height, out_width, x.scalar_type());
  const Tensor place = empty_channels_last(x, x.size(0), a.channels, out_height, out_width, ScalarType::Byte);
  if (out.numel() == 0) return {out, place};
  a.out = out.mutable_data_ptr();
  a.place = place.mutable_data_ptr<uint8_t>();
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  const int64_t work = out_width * a.channels * kernel * kernel;
  run_rows(kernels().max_pool[half], a, x.size(0) * out_height, work);
  return {out, place};
}

Tensor max_pool_backward(
    const Tensor& grad, const Tensor& place, int64_t kernel, int64_t stride, int64_t padding, int64_t height,
    int64_t width) {
  check_max_pool_backward(grad, place, kernel, stride, padding, height, width);
  MaxPoolArgs a{};
  a.grad = grad.const_data_ptr();
  a.place = const_cast<uint8_t*>(place.const_data_ptr<uint8_t>()); // is read
  a.channels = grad.size(1);
  a.height = height;
  a.width = width;
  a.out_height = grad.size(2);
  a.out_width = grad.size(3);
  a.kernel = kernel;
  a.stride = stride;
  a.padding = padding;
  const Tensor out = empty_channels_last(grad, grad.size(0), a.channels, height, width, grad.scalar_type());
  if (out.numel() == 0) return out;
  a.out = out.mutable_data_ptr();
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  run_rows(kernels().max_pool_backward[half], a, grad.size(0) * height, 2 * width * a.channels);
  return out;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&zsu::max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&zsu::max_pool_backward));
}
