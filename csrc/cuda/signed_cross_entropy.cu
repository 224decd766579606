#include "common.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu::cuda {
namespace {

// Rows that fit in registers: each logit is read once and its exponential taken once. dlogits may be
// logits.
template <class config, class T>
__global__ void __launch_bounds__(config::threads_per_block)
register_signed_cross_entropy_kernel(
    const T* logits, int64_t logits_stride, T* dlogits, int64_t dlogits_stride, const int64_t* targets,
    const accumulator<T>* coefs, accumulator<T>* row_loss, int64_t rows, int64_t classes) {
  using A = accumulator<T>;
  constexpr int threads_per_row = config::threads_per_row, packs_per_thread = config::template packs_per_thread<T>, size = Pack<T>::size;
  const int thread = threadIdx.x % threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * config::rows_per_block + threadIdx.x / threads_per_row;
  if (row >= rows) return; // all threads of a row leave
  const T* x = logits + row * logits_stride;
  T* dx = dlogits + row * dlogits_stride;
  const A coef = coefs[row];
  if (zero_if_unused<threads_per_row>(coef, dx, row_loss[row], classes, thread)) return;
  const int64_t target = targets[row];
  const bool valid = target >= 0 && target < classes;
  const A target_logit = valid ? static_cast<A>(to_float(x[target])) : A(0);
  const typename config::template Row<T> in_registers(x, static_cast<int>(classes), thread, misaligned(x));

  Largest<A> largest{-INFINITY};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) largest = Largest<A>::of(Largest<A>{in_registers.at(s, k)}, largest);
  const A top = reduce_row<threads_per_row>(largest, Largest<A>::of).value;

  // sum over the classes other than the target: 1 - p as such, not 1 minus p
  A e[packs_per_thread][size];
  Sum<A> others{0};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) {
      e[s][k] = exp_of_logits<T>(in_registers.at(s, k), top);
      others.value += in_registers.index(s) + k == target ? A(0) : e[s][k];
    }
  // In place: every thread has read the target's logit before this reduction's barrier (or, in a warp,
  // its shuffle), and each element is read and written by one thread.
  const A rest = reduce_row<threads_per_row>(others, [](Sum<A> a, Sum<A> b) { return a + b; }).value;
  const A shifted = target_logit - top, denominator = exp_of_logits<T>(target_logit, top) + rest;
  const A nan = std::numeric_limits<A>::quiet_NaN(); // an invalid target must be seen, and cannot raise here
  const A factor = valid ? coef / denominator : nan;
  if (thread == 0) row_loss[row] = valid ? coef * zsu::row_loss(log(denominator), shifted, rest, denominator) : nan;
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < size; ++k)
      from_float(factor * (in_registers.index(s) + k == target ? -rest : e[s][k]), out.v[k]);
    store_within(dx, in_registers.index(s), static_cast<int>(classes), out);
  }
}

// Longer rows, one a block: read twice, the second time from cache. dlogits may be logits.
template <int threads_per_row, class T>
__global__ void __launch_bounds__(threads_per_row)
signed_cross_entropy_kernel(
    const T* logits, int64_t logits_stride, T* dlogits, int64_t dlogits_stride, const int64_t* targets,
    const accumulator<T>* coefs, accumulator<T>* row_loss, int64_t, int64_t classes) {
  using A = accumulator<T>;
  constexpr int size = Pack<T>::size;
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * logits_stride;
  T* dx = dlogits + row * dlogits_stride;
  const A coef = coefs[row];
  if (zero_if_unused<threads_per_row>(coef, dx, row_loss[row], classes, thread)) return;
  const int64_t target = targets[row];
  const bool valid = target >= 0 && target < classes;
  const A target_logit = valid ? static_cast<A>(to_float(x[target])) : A(0);

  // sum over the classes other than the target: 1 - p as such, not 1 minus p
  Softmax<A> others = Softmax<A>::none();
  A top = -INFINITY;
  for_each_pack<threads_per_row>(
      x, classes, thread,
      [&](int64_t i) {
        const Pack<T> pack = load_pack(x + i);
        A highest = to_float(pack.v[0]);
#pragma unroll
        for (int k = 1; k < size; ++k) highest = to_float(pack.v[k]) > highest ? static_cast<A>(to_float(pack.v[k])) : highest;
        others.rescale(highest);
#pragma unroll
        for (int k = 0; k < size; ++k)
          if (i + k != target) others.add(to_float(pack.v[k]));
      },
      [&](int64_t i) {
        others.rescale(to_float(x[i]));
        if (i != target) others.add(to_float(x[i]));
      });
  others = reduce_row<threads_per_row>(others, Softmax<A>::merge);
  top = others.top; // the target took part in raising it
  const A shifted = target_logit - top, rest = others.sum;
  const A denominator = exp_of_difference(target_logit, top) + rest;
  const A nan = std::numeric_limits<A>::quiet_NaN(); // an invalid target must be seen, and cannot raise here
  const A factor = valid ? coef / denominator : nan;
  if (thread == 0) row_loss[row] = valid ? coef * zsu::row_loss(log(denominator), shifted, rest, denominator) : nan;

  // In place: every thread has read the target's logit before the reduction's barrier, and from here on
  // each element is read and written by one thread.
  const auto gradient = [&](A value, int64_t i) { return factor * (i == target ? -rest : exp_of_difference(value, top)); };
  for_each_pack<threads_per_row>(
      dx, classes, thread,
      [&](int64_t i) {
        Pack<T> pack = load_anywhere(x + i);
#pragma unroll
        for (int k = 0; k < size; ++k) from_float(gradient(to_float(pack.v[k]), i + k), pack.v[k]);
        store_pack(dx + i, pack);
      },
      [&](int64_t i) { from_float(gradient(to_float(x[i]), i), dx[i]); });
}

std::tuple<Tensor, Tensor> signed_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& coef) {
  check_signed_cross_entropy(logits, target, coef);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType type = accumulator_of(logits);
  const Tensor x = with_dense_rows(logits);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  const Tensor targets = contiguous_as(target, ScalarType::Long), coefs = contiguous_as(coef, type);
  const Tensor row_loss = empty_like(logits, {rows}, type);
  const Tensor losses = empty_like(logits, {2}, type);
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator<T>;
    if (rows > 0) {
      const T* first = static_cast<const T*>(x.const_data_ptr());
      const auto launch = [&](auto kernel, int64_t blocks, int threads) {
        kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(
            first, x.stride(0), static_cast<T*>(dlogits.mutable_data_ptr()), dlogits.stride(0),
            targets.const_data_ptr<int64_t>(), coefs.const_data_ptr<A>(), row_loss.mutable_data_ptr<A>(), rows, classes);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      by_row_config(
          first, x.stride(0), classes,
          [&](auto of) {
            using config = decltype(of);
            launch(register_signed_cross_entropy_kernel<config, T>, (rows + config::rows_per_block - 1) / config::rows_per_block, config::threads_per_block);
          },
          [&] { launch(signed_cross_entropy_kernel<streaming_threads, T>, rows, streaming_threads); });
    }
    sum_rows<A, true><<<1, 1024, 0, stream>>>(row_loss.const_data_ptr<A>(), coefs.const_data_ptr<A>(), losses.mutable_data_ptr<A>(), rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {losses, dlogits};
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m) {
  m.impl("signed_cross_entropy", TORCH_BOX(&zsu::cuda::signed_cross_entropy));
}
