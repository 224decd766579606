#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace zsu {
namespace {

Tensor blocked_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t top, int64_t left,
    int64_t out_height, int64_t out_width) {
  check_blocked_conv(x, weight, bias, top, left, out_height, out_width);
  BlockedConvArgs a{};
  a.inputs = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.kernel_height = weight.size(1);
  a.kernel_width = weight.size(2);
  a.outputs = weight.size(3);
  a.out_height = out_height;
  a.out_width = out_width;
  a.top = top;
  a.left = left;
  const Tensor out = torch::stable::new_empty(x, {x.size(0), a.outputs, out_height, out_width, images_per_block});
  if (out.numel() == 0) return out;
  a.x = x.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  a.out = out.mutable_data_ptr<float>();
  const int64_t row = out_width * images_per_block * a.outputs * a.inputs * a.kernel_height * a.kernel_width;
  run_rows(kernels().blocked_conv, a, x.size(0) * out_height, row);
  return out;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("blocked_conv", TORCH_BOX(&zsu::blocked_conv));
}
