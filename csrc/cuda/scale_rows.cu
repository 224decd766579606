#include "common.cuh"

#include <torch/csrc/stable/library.h>

namespace zsu::cuda {
namespace {

constexpr int threads = 256;

// One row per block. The device decides whether a factor is 1: the host never waits for it.
template <class T>
__global__ void __launch_bounds__(threads) scale_rows_kernel(
    T* rows, int64_t stride, const accumulator<T>* coef, const accumulator<T>* grad, int64_t grad_stride, int64_t classes) {
  using A = accumulator<T>;
  const int64_t row = blockIdx.x;
  const A factor = grad[coef[row] < 0 ? 0 : grad_stride];
  if (factor == 1) return;
  T* p = rows + row * stride;
  for_each_pack<threads>(
      p, classes, threadIdx.x,
      [&](int64_t i) {
        Pack<T> pack = load_pack(p + i);
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) from_float(to_float(pack.v[k]) * factor, pack.v[k]);
        store_pack(p + i, pack);
      },
      [&](int64_t i) { from_float(to_float(p[i]) * factor, p[i]); });
}

void scale_rows_(const Tensor& rows, const Tensor& coef, const Tensor& grad) {
  check_scale_rows(rows, coef, grad);
  if (rows.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor coefs = contiguous_as(coef, accumulator_of(rows));
  dispatch(rows, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator<T>;
    scale_rows_kernel<T><<<static_cast<unsigned>(rows.size(0)), threads, 0, current_stream(rows)>>>(
        static_cast<T*>(rows.mutable_data_ptr()), rows.stride(0), coefs.const_data_ptr<A>(), grad.const_data_ptr<A>(),
        grad.numel() == 2 ? grad.stride(0) : 0, rows.size(1));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m) {
  m.impl("scale_rows_", TORCH_BOX(&zsu::cuda::scale_rows_));
}
