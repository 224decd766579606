#include "channels_last.h"
#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace zsu {
namespace {

// How many tiles are computed at once. What lies between the transforms and the products, 768 KiB, should stay in
// the second-level cache; but with fewer than 96 tiles, reading the weights would take too long. A multiple of the
// rows that a product computes at once.
int64_t chunk_of(const WinogradConvArgs& a) {
  const int64_t most = std::max<int64_t>(96, (768 << 10) / (36 * 4 * (a.inputs + a.outputs)));
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t chunks = (a.tiles + most - 1) / most;
  const int64_t even = (chunks + threads - 1) / threads * threads; // the same number for each thread
  return ((a.tiles + even - 1) / even + 11) / 12 * 12;
}

Tensor winograd_conv(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
    int64_t outputs, int64_t padding, double low, double high) {
  check_winograd_conv(x, weight, bias, other, outputs, padding);
  WinogradConvArgs a{};
  a.height = x.size(2);
  a.width = x.size(3);
  a.inputs = x.size(1);
  a.outputs = outputs;
  a.padding = padding;
  a.out_height = a.height + 2 * padding - 2;
  a.out_width = a.width + 2 * padding - 2;
  a.blocks = weight.size(1);
  a.block = weight.size(3);
  a.tile_rows = (a.out_height + 3) / 4;
  a.tile_columns = (a.out_width + 3) / 4;
  a.tiles = x.size(0) * a.tile_rows * a.tile_columns;
  a.low = static_cast<float>(low);
  a.high = static_cast<float>(high);
  const Tensor out = empty_channels_last(x, x.size(0), outputs, a.out_height, a.out_width, ScalarType::Float);
  if (a.tiles == 0) return out;
  a.x = x.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  a.other = other ? other->const_data_ptr<float>() : nullptr;
  a.out = out.mutable_data_ptr<float>();
  a.chunk = chunk_of(a);
  const auto kernel = kernels().winograd_conv;
  torch::stable::parallel_for(0, (a.tiles + a.chunk - 1) / a.chunk, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return out;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("winograd_conv", TORCH_BOX(&zsu::winograd_conv));
}
