#include "channels_last.h"
#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

// The windows over maps [images, channels, height, width], and what is read.
MaxPoolArgs pooling(
    const Tensor& read, int64_t kernel, int64_t stride, int64_t padding, int64_t height, int64_t width,
    int64_t out_height, int64_t out_width) {
  MaxPoolArgs a{};
  a.from = read.const_data_ptr();
  a.channels = read.size(1);
  a.height = height;
  a.width = width;
  a.out_height = out_height;
  a.out_width = out_width;
  a.kernel = kernel;
  a.stride = stride;
  a.padding = padding;
  return a;
}

// The index of a dtype's kernel.
int kernel_of(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

std::tuple<Tensor, Tensor> max_pool(
    const Tensor& x, int64_t kernel, int64_t stride, int64_t padding, int64_t out_height, int64_t out_width, bool relu) {
  check_max_pool(x, kernel, stride, padding, out_height, out_width);
  MaxPoolArgs a = pooling(x, kernel, stride, padding, x.size(2), x.size(3), out_height, out_width);
  a.relu = relu;
  const Tensor out = empty_channels_last(x, x.size(0), a.channels, out_height, out_width, x.scalar_type());
  const Tensor place = empty_channels_last(x, x.size(0), a.channels, out_height, out_width, ScalarType::Byte);
  if (out.numel() == 0) return {out, place};
  a.to = out.mutable_data_ptr();
  a.place = place.mutable_data_ptr<uint8_t>();
  const int64_t work = out_width * a.channels * kernel * kernel;
  run_rows(kernels().max_pool[kernel_of(x)], a, x.size(0) * out_height, work);
  return {out, place};
}

Tensor max_pool_backward(
    const Tensor& grad, const Tensor& place, int64_t kernel, int64_t stride, int64_t padding, int64_t height,
    int64_t width) {
  check_max_pool_backward(grad, place, kernel, stride, padding, height, width);
  MaxPoolArgs a = pooling(grad, kernel, stride, padding, height, width, grad.size(2), grad.size(3));
  a.place = const_cast<uint8_t*>(place.const_data_ptr<uint8_t>()); // is read
  const Tensor out = empty_channels_last(grad, grad.size(0), a.channels, height, width, grad.scalar_type());
  if (out.numel() == 0) return out;
  a.to = out.mutable_data_ptr();
  run_rows(kernels().max_pool_backward[kernel_of(grad)], a, grad.size(0) * height, 2 * width * a.channels);
  return out;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&zsu::max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&zsu::max_pool_backward));
}
