#include "common.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu::cuda {
namespace {

// 1 / sum. In double, the slow path of a division is a call around which registers spill; the logarithm
// is needed anyway.
__device__ inline float reciprocal(float sum, float) { return 1 / sum; }
__device__ inline double reciprocal(double, double log_sum) { return exp(-log_sum); }

// Rows of student and teacher that fit in registers: each number is read once and its exponential taken
// once. The teacher's masked softmax is never stored: its maximum and sum are enough.
template <class config, class T>
__global__ void __launch_bounds__(config::threads_per_block)
register_masked_cross_entropy_kernel(
    const T* logits, int64_t logits_stride, const T* teacher, int64_t teacher_stride, const bool* forget, T* dlogits,
    const accumulator<T>* coefs, accumulator<T>* row_loss, int64_t rows, int64_t classes) {
  using A = accumulator<T>;
  constexpr int threads_per_row = config::threads_per_row, size = Pack<T>::size;
  constexpr int packs_per_thread = config::template packs_per_thread<T>;
  const int thread = threadIdx.x % threads_per_row, count = static_cast<int>(classes);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * config::rows_per_block + threadIdx.x / threads_per_row;
  if (row >= rows) return; // all threads of a row return together
  const T* x = logits + row * logits_stride;
  const T* z = teacher + row * teacher_stride;
  T* dx = dlogits + row * classes;
  const A coef = coefs[row];
  if (zero_if_unused<threads_per_row>(coef, dx, row_loss[row], classes, thread)) return;
  const typename config::template Row<T> student(x, count, thread, misaligned(x));
  typename config::template Row<T> masked(z, count, thread, misaligned(x)); // the same elements, wherever z starts
  Pair<Largest<A>> largest{{-INFINITY}, {-INFINITY}};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const int i = student.index(s) + k;
      if (i >= 0 && i < count && forget[i]) from_float(A(-INFINITY), masked.packs[s].v[k]);
      largest = Pair<Largest<A>>::merge({{student.at(s, k)}, {masked.at(s, k)}}, largest);
    }
  largest = reduce_row<threads_per_row>(largest);
  const A top_x = largest.student.value, top_z = largest.teacher.value;

  A ex[packs_per_thread][size], ez[packs_per_thread][size];
  Pair<Sum<A>> sums{{0}, {0}};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s)
#pragma unroll
    for (int k = 0; k < size; ++k) {
      ex[s][k] = exp_of_logits<T>(student.at(s, k), top_x);
      ez[s][k] = exp_of_logits<T>(masked.at(s, k), top_z);
      sums = Pair<Sum<A>>::merge(sums, {{ex[s][k]}, {ez[s][k]}});
    }
  sums = reduce_row<threads_per_row>(sums);
  const A sum_x = sums.student.value, sum_z = sums.teacher.value;
  const A log_x = log(sum_x), log_z = log(sum_z), log_ratio = log_x - log_z;
  const A scale_x = coef * reciprocal(sum_x, log_x), scale_z = coef * reciprocal(sum_z, log_z);

  Sum<A> loss{0};
#pragma unroll
  for (int s = 0; s < packs_per_thread; ++s) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const A q = ez[s][k];
      if (q != 0) loss.value += q * ((masked.at(s, k) - top_z) - (student.at(s, k) - top_x) + log_ratio);
      from_float(ex[s][k] * scale_x - q * scale_z, out.v[k]);
    }
    store_within(dx, student.index(s), count, out);
  }
  loss = reduce_row<threads_per_row>(loss);
  if (thread == 0) row_loss[row] = loss.value * scale_z;
}

// Longer rows, one per block: read twice, the second time from cache.
template <int threads_per_row, class T>
__global__ void __launch_bounds__(threads_per_row)
streaming_masked_cross_entropy_kernel(
    const T* logits, int64_t logits_stride, const T* teacher, int64_t teacher_stride, const bool* forget, T* dlogits,
    const accumulator<T>* coefs, accumulator<T>* row_loss, int64_t, int64_t classes) {
  using A = accumulator<T>;
  constexpr int size = Pack<T>::size;
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * logits_stride;
  const T* z = teacher + row * teacher_stride;
  T* dx = dlogits + row * classes;
  const A coef = coefs[row];
  if (zero_if_unused<threads_per_row>(coef, dx, row_loss[row], classes, thread)) return;

  Pair<Softmax<A>> sums{Softmax<A>::none(), Softmax<A>::none()};
  const auto add = [&](A student, A of_teacher, int64_t i) {
    sums.student.rescale(student);
    sums.student.add(student);
    if (!forget[i]) {
      sums.teacher.rescale(of_teacher);
      sums.teacher.add(of_teacher);
    }
  };
  for_each_pack<threads_per_row>(
      x, classes, thread,
      [&](int64_t i) {
        const Pack<T> px = load_pack(x + i), pz = load_anywhere(z + i);
#pragma unroll
        for (int k = 0; k < size; ++k) add(to_float(px.v[k]), to_float(pz.v[k]), i + k);
      },
      [&](int64_t i) { add(to_float(x[i]), to_float(z[i]), i); });
  sums = reduce_row<threads_per_row>(sums);
  const A top_x = sums.student.top, top_z = sums.teacher.top;
  const A log_x = log(sums.student.sum), log_z = log(sums.teacher.sum), log_ratio = log_x - log_z;
  const A scale_x = coef * reciprocal(sums.student.sum, log_x), scale_z = coef * reciprocal(sums.teacher.sum, log_z);

  Sum<A> loss{0};
  const auto gradient = [&](A student, A of_teacher, int64_t i) {
    const A ex = exp_of_difference(student, top_x);
    const A ez = forget[i] ? A(0) : exp_of_difference(of_teacher, top_z);
    if (ez != 0) loss.value += ez * ((of_teacher - top_z) - (student - top_x) + log_ratio);
    return ex * scale_x - ez * scale_z;
  };
  for_each_pack<threads_per_row>(
      dx, classes, thread,
      [&](int64_t i) {
        const Pack<T> px = load_anywhere(x + i), pz = load_anywhere(z + i);
        Pack<T> out;
#pragma unroll
        for (int k = 0; k < size; ++k) from_float(gradient(to_float(px.v[k]), to_float(pz.v[k]), i + k), out.v[k]);
        store_pack(dx + i, out);
      },
      [&](int64_t i) { from_float(gradient(to_float(x[i]), to_float(z[i]), i), dx[i]); });
  loss = reduce_row<threads_per_row>(loss);
  if (thread == 0) row_loss[row] = loss.value * scale_z;
}

std::tuple<Tensor, Tensor> masked_cross_entropy(
    const Tensor& logits, const Tensor& teacher, const Tensor& forget, const Tensor& coef) {
  const MaskedCrossEntropyInputs in = masked_cross_entropy_inputs(logits, teacher, forget, coef);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType type = accumulator_of(logits);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  const Tensor row_loss = empty_like(logits, {rows}, type);
  const Tensor loss = torch::stable::new_empty(logits, {}, type);
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator<T>;
    launch_rows(
        Rows<T>{static_cast<const T*>(in.logits.const_data_ptr()), in.logits.stride(0), rows, classes}, stream,
        [](auto config) { return register_masked_cross_entropy_kernel<decltype(config), T>; },
        streaming_masked_cross_entropy_kernel<streaming_threads, T>, static_cast<const T*>(in.teacher.const_data_ptr()),
        in.teacher.stride(0), in.forget.const_data_ptr<bool>(), static_cast<T*>(dlogits.mutable_data_ptr()),
        in.coef.const_data_ptr<A>(), row_loss.mutable_data_ptr<A>());
    sum_rows_kernel<A, false><<<1, 1024, 0, stream>>>(
        row_loss.const_data_ptr<A>(), in.coef.const_data_ptr<A>(), loss.mutable_data_ptr<A>(), rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, dlogits};
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CUDA, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&zsu::cuda::masked_cross_entropy));
}
