#include "common.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu::cuda {
namespace {

// Writes the loss of a row and returns the factor of its gradient. An invalid target gives NaN: the
// caller must notice it, and a kernel cannot raise.
template <class A>
__device__ A write_loss(A& row_loss, A coef, bool valid, A shifted, A rest, A denominator, int thread) {
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const A factor = valid ? coef / denominator : nan;
  if (thread == 0) row_loss = valid ? coef * zsu::row_loss(log(denominator), shifted, rest, denominator) : nan;
  return factor;
}

// Rows that fit in registers: each logit is read once and its exponential taken once.
template <class config, class T>
__global__ void __launch_bounds__(config::threads_per_block)
register_signed_cross_entropy_kernel(
    const T* logits, int64_t logits_stride, T* dlogits, int64_t dlogits_stride, const int64_t* targets,
    const accumulator<T>* coefs, accumulator<T>* row_loss, int64_t rows, int64_t classes) {
  using A = accumulator<T>;
  constexpr int threads_per_row = config::threads_per_row, size = Pack<T>::size;
  constexpr int packs_per_thread = config::template packs_per_thread<T>;
  const int thread = threadIdx.x % threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * config::rows_per_block + threadIdx.x / threads_per_row;
  if (row >= rows) return; // all threads of a row return together
  const T* x = logits + row * logits_stride;
  T* dx = dlogits + row * dlogits_stride;
  const A coef = coefs[row];
  if (zero_if_unused<threads_per_row>(coef, dx, row_loss[row], classes, thread)) return;
  const int64_t target = targets[row];
  const bool valid = target >= 0 && target < classes;
  const A target_logit = valid ? static_cast<A>(to_float(x[target])) : A(0);
  const typename config::template Row<T> student(x, static_cast<int>(classes), thread, misaligned(x));

  Largest<A> largest{-INFINITY};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) largest = Largest<A>::merge(Largest<A>{student.at(s, k)}, largest);
  const A top = reduce_row<threads_per_row>(largest).value;

  // the sum over the other classes is 1 - p; subtracting p from 1 would lose digits
  A e[packs_per_thread][size];
  Sum<A> others{0};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) {
      e[s][k] = exp_of_logits<T>(student.at(s, k), top);
      others.value += student.index(s) + k == target ? A(0) : e[s][k];
    }
  const A rest = reduce_row<threads_per_row>(others).value;
  const A shifted = target_logit - top, denominator = exp_of_logits<T>(target_logit, top) + rest;
  const A factor = write_loss(row_loss[row], coef, valid, shifted, rest, denominator, thread);
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < size; ++k)
      from_float(factor * (student.index(s) + k == target ? -rest : e[s][k]), out.v[k]);
    store_within(dx, student.index(s), static_cast<int>(classes), out);
  }
}

// Longer rows, one per block: read twice, the second time from cache.
template <int threads_per_row, class T>
__global__ void __launch_bounds__(threads_per_row)
streaming_signed_cross_entropy_kernel(
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

  // the sum over the other classes is 1 - p; subtracting p from 1 would lose digits
  Softmax<A> others = Softmax<A>::none();
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
  others = reduce_row<threads_per_row>(others);
  const A top = others.top; // of all classes: the target took part in rescaling
  const A shifted = target_logit - top, rest = others.sum;
  const A denominator = exp_of_difference(target_logit, top) + rest;
  const A factor = write_loss(row_loss[row], coef, valid, shifted, rest, denominator, thread);

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
  const SignedCrossEntropyInputs in = signed_cross_entropy_inputs(logits, target, coef);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType type = accumulator_of(logits);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  const Tensor row_loss = empty_like(logits, {rows}, type);
  const Tensor losses = empty_like(logits, {2}, type);
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator<T>;
    launch_rows(
        Rows<T>{static_cast<const T*>(in.logits.const_data_ptr()), in.logits.stride(0), rows, classes}, stream,
        [](auto config) { return register_signed_cross_entropy_kernel<decltype(config), T>; },
        streaming_signed_cross_entropy_kernel<streaming_threads, T>, static_cast<T*>(dlogits.mutable_data_ptr()),
        dlogits.stride(0), in.target.const_data_ptr<int64_t>(), in.coef.const_data_ptr<A>(), row_loss.mutable_data_ptr<A>());
    sum_rows_kernel<A, true><<<1, 1024, 0, stream>>>(
        row_loss.const_data_ptr<A>(), in.coef.const_data_ptr<A>(), losses.mutable_data_ptr<A>(), rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {losses, dlogits};
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m) {
  m.impl("signed_cross_entropy", TORCH_BOX(&zsu::cuda::signed_cross_entropy));
}
