#include "rows.cuh"

#include <torch/csrc/stable/library.h>

namespace zsu::cuda {
namespace {

constexpr int threads = 256;

// The device decides whether a factor is 1, and the host never waits for it: if both factors are, as in
// most backward passes, every block leaves at once.
template <class T>
__global__ void __launch_bounds__(threads) scale_rows_kernel(
    Matrix<T> rows, const accumulator<T>* coefs, const accumulator<T>* grad, int64_t grad_stride) {
  using A = accumulator<T>;
  constexpr int size = pack_size<T>;
  const A factors[2] = {grad[0], grad[grad_stride]};
  if (factors[0] == 1 && factors[1] == 1) return;
  for (int64_t row = blockIdx.x; row < rows.rows; row += gridDim.x) {
    const A factor = coefs[row] < 0 ? factors[0] : factors[1];
    if (factor == 1) continue;
    T* p = rows.row(row);
    for_each_pack<threads>(
        p, rows.classes, threadIdx.x,
        [&](int i) {
          A v[size];
          unpack(load_raw<size>(p + i), v);
#pragma unroll
          for (int k = 0; k < size; ++k) v[k] *= factor;
          store_raw<size>(p + i, pack<T>(v));
        },
        [&](int i) { from_float(static_cast<A>(to_float(p[i])) * factor, p[i]); });
  }
}

void scale_rows_(const Tensor& rows, const Tensor& coef, const Tensor& grad) {
  check_scale_rows(rows, coef, grad);
  if (rows.size(0) == 0) return;
  const Stream stream(rows);
  const Tensor coefs = contiguous_as(coef, accumulator_of(rows));
  dispatch(rows, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator<T>;
    const int64_t blocks = resident_blocks(scale_rows_kernel<T>, threads, rows.size(0));
    launch(
        scale_rows_kernel<T>, blocks, threads, stream, matrix<T>(rows), coefs.const_data_ptr<A>(),
        grad.const_data_ptr<A>(), grad.numel() == 2 ? grad.stride(0) : 0);
  });
}

} // namespace
} // namespace zsu::cuda

ZSU_CUDA_IMPL {
  m.impl("scale_rows_", TORCH_BOX(&zsu::cuda::scale_rows_));
}
