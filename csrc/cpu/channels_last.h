// New channels-last tensors.
#pragma once

#include "../checks.h"

namespace zsu {

// [batch, channels, height, width]
inline Tensor empty_channels_last(
    const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType type) {
  const int64_t sizes[] = {batch, channels, height, width};
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

} // namespace zsu
