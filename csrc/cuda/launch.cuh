// Launches on torch's current stream. Without nvcc, tests/ops/cuda_emulator stands in for it.
#pragma once

#ifdef __CUDACC__

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#define ZSU_CUDA_IMPL STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m)

namespace zsu::cuda {

// The device of a tensor, current for the life of this object, and torch's current stream on it.
struct Stream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Stream(const torch::stable::Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

inline void check_cuda(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status)); }

// `wanted` blocks, or as many as run at the same time on the current device.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, int64_t wanted) {
  int device = 0, processors = 0, per_processor = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (wanted <= processors) return wanted;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0));
  return std::min(wanted, static_cast<int64_t>(processors) * std::max(1, per_processor));
}

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Stream& stream, Args... args) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream.stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace zsu::cuda

#endif
