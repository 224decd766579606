#include "common.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu::cuda {
namespace {

// Rows that fit in registers: each logit is read once and its exponential taken once. dlogits may be
// logits.
template <class tier, class T>
__global__ void __launch_bounds__(tier::threads)
held_signed_cross_entropy_kernel(
    const T* logits, int64_t logits_stride, T* dlogits, int64_t dlogits_stride, const int64_t* targets,
    const accumulator<T>* coefs, accumulator<T>* row_loss, int64_t rows, int64_t classes) {
  using A = accumulator<T>;
  constexpr int span = tier::span, slots = tier::template slots<T>, size = Pack<T>::size;
  const int thread = threadIdx.x % span;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * tier::rows + threadIdx.x / span;
  if (row >= rows) return; // all threads of a row leave
  const T* x = logits + row * logits_stride;
  T* dx = dlogits + row * dlogits_stride;
  const A coef = coefs[row];
  if (left_out<span>(coef, dx, row_loss[row], classes, thread)) return;
  const int64_t target = targets[row];
  const bool valid = target >= 0 && target < classes;
  const A target_logit = valid ? static_cast<A>(widen(x[target])) : A(0);
  const typename tier::template Row<T> held(x, static_cast<int>(classes), thread, misaligned(x));

  Largest<A> largest{-INFINITY};
#pragma unroll
  for (int s = 0; s < slots; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) largest = Largest<A>::of(Largest<A>{held.at(s, k)}, largest);
  const A top = reduce_row<span>(largest, Largest<A>::of).value;

  // sum over the classes other than the target: 1 - p as such, not 1 minus p
  A e[slots][size];
  Sum<A> others{0};
#pragma unroll
  for (int s = 0; s < slots; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) {
      e[s][k] = exp_of_logits<T>(held.at(s, k), top);
      others.value += held.index(s) + k == target ? A(0) : e[s][k];
    }
  // In place: every thread has read the target's logit before this reduction's barrier (or, in a warp,
  // its shuffle), and each element is read and written by one thread.
  const A rest = reduce_row<span>(others, [](Sum<A> a, Sum<A> b) { return a + b; }).value;
  const A shifted = target_logit - top, denominator = exp_of_logits<T>(target_logit, top) + rest;
  const A nan = std::numeric_limits<A>::quiet_NaN(); // an invalid target must be seen, and cannot raise here
  const A factor = valid ? coef / denominator : nan;
  if (thread == 0) row_loss[row] = valid ? coef * zsu::row_loss(log(denominator), shifted, rest, denominator) : nan;
#pragma unroll
  for (int s = 0; s < slots; ++s) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < size; ++k)
      narrow(factor * (held.index(s) + k == target ? -rest : e[s][k]), out.v[k]);
    store_within(dx, held.index(s), static_cast<int>(classes), out);
  }
}

// Longer rows, one a block: read twice, the second time from cache. dlogits may be logits.
template <int span, class T>
__global__ void __launch_bounds__(span)
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
  if (left_out<span>(coef, dx, row_loss[row], classes, thread)) return;
  const int64_t target = targets[row];
  const bool valid = target >= 0 && target < classes;
  const A target_logit = valid ? static_cast<A>(widen(x[target])) : A(0);

  // sum over the classes other than the target: 1 - p as such, not 1 minus p
  Softmax<A> others = Softmax<A>::none();
  A top = -INFINITY;
  visit_row<span>(
      x, classes, thread,
      [&](int64_t i) {
        const Pack<T> pack = load_pack(x + i);
        A highest = widen(pack.v[0]);
#pragma unroll
        for (int k = 1; k < size; ++k) highest = widen(pack.v[k]) > highest ? static_cast<A>(widen(pack.v[k])) : highest;
        others.raise(highest);
#pragma unroll
        for (int k = 0; k < size; ++k)
          if (i + k != target) others.add(widen(pack.v[k]));
      },
      [&](int64_t i) {
        others.raise(widen(x[i]));
        if (i != target) others.add(widen(x[i]));
      });
  others = reduce_row<span>(others, Softmax<A>::merge);
  top = others.top; // the target took part in raising it
  const A shifted = target_logit - top, rest = others.sum;
  const A denominator = exp_of_difference(target_logit, top) + rest;
  const A nan = std::numeric_limits<A>::quiet_NaN(); // an invalid target must be seen, and cannot raise here
  const A factor = valid ? coef / denominator : nan;
  if (thread == 0) row_loss[row] = valid ? coef * zsu::row_loss(log(denominator), shifted, rest, denominator) : nan;

  // In place: every thread has read the target's logit before the reduction's barrier, and from here on
  // each element is read and written by one thread.
  const auto gradient = [&](A value, int64_t i) { return factor * (i == target ? -rest : exp_of_difference(value, top)); };
  visit_row<span>(
      dx, classes, thread,
      [&](int64_t i) {
        Pack<T> pack = load_anywhere(x + i);
#pragma unroll
        for (int k = 0; k < size; ++k) narrow(gradient(widen(pack.v[k]), i + k), pack.v[k]);
        store_pack(dx + i, pack);
      },
      [&](int64_t i) { narrow(gradient(widen(x[i]), i), dx[i]); });
}

template <class T>
__global__ void __launch_bounds__(256) scale_rows_kernel(
    T* rows, int64_t stride, const accumulator<T>* coef, const accumulator<T>* grad, int64_t grad_stride, int64_t classes) {
  using A = accumulator<T>;
  const int64_t row = blockIdx.x;
  const A factor = grad[coef[row] < 0 ? 0 : grad_stride];
  if (factor == 1) return; // decided here: the host never waits
  T* p = rows + row * stride;
  visit_row<256>(
      p, classes, threadIdx.x,
      [&](int64_t i) {
        Pack<T> pack = load_pack(p + i);
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) narrow(widen(pack.v[k]) * factor, pack.v[k]);
        store_pack(p + i, pack);
      },
      [&](int64_t i) { narrow(widen(p[i]) * factor, p[i]); });
}

std::tuple<Tensor, Tensor> signed_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& coef) {
  check_signed(logits, target, coef);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType type = accumulator_of(logits);
  const Tensor x = with_dense_rows(logits);
  const Tensor dlogits = fresh(logits, {rows, classes}, logits.scalar_type());
  const Tensor targets = contiguous_as(target, ScalarType::Long), coefs = contiguous_as(coef, type);
  const Tensor row_loss = fresh(logits, {rows}, type);
  const Tensor losses = fresh(logits, {2}, type);
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
      by_tier(
          first, x.stride(0), classes,
          [&](auto of) {
            using tier = decltype(of);
            launch(held_signed_cross_entropy_kernel<tier, T>, (rows + tier::rows - 1) / tier::rows, tier::threads);
          },
          [&] { launch(signed_cross_entropy_kernel<streaming_span, T>, rows, streaming_span); });
    }
    sum_rows<A, true><<<1, 1024, 0, stream>>>(row_loss.const_data_ptr<A>(), coefs.const_data_ptr<A>(), losses.mutable_data_ptr<A>(), rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {losses, dlogits};
}

void scale_rows_(const Tensor& rows, const Tensor& coef, const Tensor& grad) {
  check_scaled(rows, coef, grad);
  if (rows.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor coefs = contiguous_as(coef, accumulator_of(rows));
  dispatch(rows, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator<T>;
    scale_rows_kernel<T><<<static_cast<unsigned>(rows.size(0)), 256, 0, current_stream(rows)>>>(
        static_cast<T*>(rows.mutable_data_ptr()), rows.stride(0), coefs.const_data_ptr<A>(), grad.const_data_ptr<A>(),
        grad.numel() == 2 ? grad.stride(0) : 0, rows.size(1));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m) {
  m.impl("signed_cross_entropy", TORCH_BOX(&zsu::cuda::signed_cross_entropy));
  m.impl("scale_rows_", TORCH_BOX(&zsu::cuda::scale_rows_));
}
