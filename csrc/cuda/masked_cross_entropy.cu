#include "rows.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu::cuda {
namespace {

template <class T, class Z>
struct MaskedRows {
  Matrix<const T> logits;
  Matrix<const Z> teacher;
  Matrix<T> dlogits;
  const int64_t* index; // row of the teacher for each row of logits; null: the same
  const bool* forget;
  const uint32_t* mask; // of `write_mask`, for the streaming kernel
  const accumulator<T>* coefs;
  const accumulator<T>* keep; // null: 0
  accumulator<T> shift;
  bool forget_only;
};

// The teacher's row for a row of logits; -1 if it has no such row.
template <class T, class Z>
__device__ int64_t teacher_row(const MaskedRows<T, Z>& a, int64_t row) {
  if (row >= a.logits.rows) return -1;
  if (a.index == nullptr) return row;
  const int64_t i = a.index[row];
  return i >= 0 && i < a.teacher.rows ? i : -1;
}

__device__ inline bool is_set(uint32_t bits, int k) { return (bits & (1u << k)) != 0; }

// Rows of student and teacher that fit in registers: each number is read once and its exponential taken
// once. The teacher's masked softmax is never stored: its maximum and sum are enough. `whole` rows have no
// term that keeps retained logits: without their changes, 16 classes a thread fit in 64 registers.
template <class config, class T, class Z, bool whole>
__global__ void __launch_bounds__(config::threads_per_block, blocks_per_processor<config, sizeof(T) == 8 ? 96 : 64>)
register_masked_cross_entropy_kernel(MaskedRows<T, Z> a, double* losses) {
  using A = accumulator<T>;
  constexpr int span = config::threads_per_row, size = pack_size<T>, packs = config::template packs<T>;
  constexpr int rows_per_block = config::rows_per_block;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  __shared__ double sums[rows_per_block][2];
  __shared__ uint32_t mask[config::template capacity<T> / 32 + 2];
  const int thread = threadIdx.x % span, turn = threadIdx.x / span, classes = a.logits.classes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_per_block;
  if (thread == 0) sums[turn][0] = sums[turn][1] = 0;
  write_mask(a.forget, mask, classes, threadIdx.x, config::threads_per_block);
  __syncthreads();

  int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + turn;
  int64_t next_teacher = teacher_row(a, row); // a row ahead, so that its logits do not wait for it
#pragma unroll 1
  for (; row < a.logits.rows; row += step) {
    const T* logits = a.logits.row(row);
    T* dlogits = a.dlogits.row(row);
    const int64_t of_teacher = next_teacher;
    const Z* teacher = a.teacher.row(of_teacher < 0 ? 0 : of_teacher);
    const int first = thread * size - (whole ? 0 : misaligned(logits));
    RegisterRow<T, size, packs, span, whole> x{logits, first, classes, true, a.logits.is_edge(row)};
    RegisterRow<Z, size, packs, span, whole> z{
        teacher, first, classes, whole || is_aligned(teacher + first), a.teacher.is_edge(of_teacher)};
    x.load();
    z.load();
    const A coef = a.coefs[row], keep = whole || a.keep == nullptr ? A(0) : a.keep[row];
    next_teacher = teacher_row(a, row + step);
    if (coef == 0) { // whatever the logits are
      for (int i = thread; i < classes; i += span) from_float(A(0), dlogits[i]);
      continue;
    }
    x.mask_ends();
    z.mask_ends();

    A vx[packs][size], vz[packs][size];
    [[maybe_unused]] A change[whole ? 1 : packs][size]; // of retained logits
    Largest<A, 2> largest{{lowest, lowest}};
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      const uint32_t retained = mask_bits(mask, x.index(s));
      unpack(x.raw[s], vx[s]);
      unpack(z.raw[s], vz[s]);
      if constexpr (!whole) {
#pragma unroll
        for (int k = 0; k < size; ++k) change[s][k] = is_set(retained, k) ? vx[s][k] - vz[s][k] : A(0);
      }
      if (a.shift != 0) {
#pragma unroll
        for (int k = 0; k < size; ++k) vx[s][k] += is_set(retained, k) ? A(0) : a.shift;
      }
#pragma unroll
      for (int k = 0; k < size; ++k) {
        if (!is_set(retained, k)) vz[s][k] = lowest;
        largest.v[0] = larger(largest.v[0], vx[s][k]);
        largest.v[1] = larger(largest.v[1], vz[s][k]);
      }
    }
    largest = reduce_row<span, 0>(largest);
    const Exp<T> exp_x(largest.v[0]), exp_z(largest.v[1]);

    // of exp(x), exp(z), exp(z) * log(exp(z) / exp(x)), which is 0 where exp(z) is, and squared changes
    Sum<A, whole ? 3 : 4> sum{};
#pragma unroll
    for (int s = 0; s < packs; ++s)
#pragma unroll
      for (int k = 0; k < size; ++k) {
        const A gap = larger(exp_z.exponent(vz[s][k]) - exp_x.exponent(vx[s][k]), A(-1e4)); // not -inf or NaN
        sum.v[0] += vx[s][k] = exp_x(vx[s][k]);
        sum.v[1] += vz[s][k] = exp_z(vz[s][k]);
        sum.v[2] += vz[s][k] * gap;
        if constexpr (!whole) sum.v[3] += change[s][k] * change[s][k];
      }
    sum = reduce_row<span, 1>(sum);

    // NaN for an invalid row of the teacher: the caller must notice it, and a kernel cannot raise
    const A factor = of_teacher < 0 ? std::numeric_limits<A>::quiet_NaN() : coef;
    const A scale_x = quotient(factor, sum.v[0]), scale_z = quotient(factor, sum.v[1]);
#pragma unroll
    for (int s = 0; s < packs; ++s) {
#pragma unroll
      for (int k = 0; k < size; ++k) vx[s][k] = vx[s][k] * scale_x - vz[s][k] * scale_z;
      if constexpr (!whole) {
        if (keep != 0) { // otherwise a change may be infinite
#pragma unroll
          for (int k = 0; k < size; ++k) vx[s][k] += 2 * keep * change[s][k];
        }
      }
      if (a.forget_only) {
        const uint32_t retained = mask_bits(mask, x.index(s));
#pragma unroll
        for (int k = 0; k < size; ++k) vx[s][k] = is_set(retained, k) ? A(0) : vx[s][k];
      }
      store_values<whole>(dlogits, x.index(s), classes, vx[s]);
    }
    if (thread == 0) {
      A loss = factor * (Exp<T>::base_log * (sum.v[2] / sum.v[1]) + (log(sum.v[0]) - log(sum.v[1])));
      if constexpr (!whole) loss += keep == 0 ? A(0) : keep * sum.v[3];
      add_loss(sums[turn], coef, static_cast<double>(loss));
    }
  }
  write_losses(sums, losses);
}

__global__ void write_mask_kernel(const bool* forget, uint32_t* words, int64_t classes) {
  write_mask(forget, words, classes, static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, blockDim.x * static_cast<int64_t>(gridDim.x));
}

// Longer rows, one per block: read twice, the second time from cache.
template <class T, class Z>
__global__ void __launch_bounds__(streaming_threads<T>, 1) streaming_masked_cross_entropy_kernel(MaskedRows<T, Z> a, double* losses) {
  using A = accumulator<T>;
  constexpr int size = pack_size<T>, span = streaming_threads<T>;
  __shared__ double sums[1][2];
  const int thread = threadIdx.x;
  const int classes = a.logits.classes;
  if (thread == 0) sums[0][0] = sums[0][1] = 0;

#pragma unroll 1
  for (int64_t row = blockIdx.x; row < a.logits.rows; row += gridDim.x) {
    const T* x = a.logits.row(row);
    T* dx = a.dlogits.row(row);
    const A coef = a.coefs[row], keep = a.keep == nullptr ? A(0) : a.keep[row];
    if (coef == 0) { // whatever the logits are
      for (int i = thread; i < classes; i += span) from_float(A(0), dx[i]);
      continue;
    }
    const int64_t of_teacher = teacher_row(a, row);
    const Z* z = a.teacher.row(of_teacher < 0 ? 0 : of_teacher);
    const A factor = of_teacher < 0 ? std::numeric_limits<A>::quiet_NaN() : coef;

    Softmax<T> student, teacher;
    const auto add = [&](A of_x, A of_z, bool retained) {
      student.rescale(of_x);
      student.add(of_x);
      if (retained) {
        teacher.rescale(of_z);
        teacher.add(of_z);
      }
    };
    // calls f(x with its shift, z, whether the class is retained, place) for the pack at i
    const auto visit = [&](int i, auto f) {
      A vx[size], vz[size];
      unpack(load_anywhere<size>(x + i), vx);
      unpack(load_anywhere<size>(z + i), vz);
      const uint32_t retained = mask_bits(a.mask, i);
#pragma unroll
      for (int k = 0; k < size; ++k) f(is_set(retained, k) ? vx[k] : vx[k] + a.shift, vz[k], is_set(retained, k), k);
    };
    const auto visit_one = [&](int i, auto f) {
      const A of_x = to_float(x[i]);
      const bool retained = is_set(mask_bits(a.mask, i), 0);
      f(retained ? of_x : of_x + a.shift, static_cast<A>(to_float(z[i])), retained);
    };
    for_each_pack<span>(
        x, classes, thread,
        [&](int i) { visit(i, [&](A of_x, A of_z, bool retained, int) { add(of_x, of_z, retained); }); },
        [&](int i) { visit_one(i, add); });
    const Largest<A, 2> top = reduce_row<span, 0>(Largest<A, 2>{{student.top, teacher.top}});
    const A top_x = top.v[0], top_z = top.v[1];
    student.rescale(top_x);
    teacher.rescale(top_z);
    const Sum<A, 2> sum = reduce_row<span, 1>(Sum<A, 2>{{student.sum, teacher.sum}});
    const A log_ratio = log(sum.v[0]) - log(sum.v[1]);
    const A scale_x = quotient(factor, sum.v[0]), scale_z = quotient(factor, sum.v[1]);

    Sum<A, 2> loss{{0, 0}};
    const auto gradient = [&](A of_x, A of_z, bool retained) {
      const A ex = exp_of_logit<T>(of_x, top_x), ez = retained ? exp_of_logit<T>(of_z, top_z) : A(0);
      if (ez != 0) loss.v[0] += ez * ((of_z - top_z) - (of_x - top_x) + log_ratio);
      if (!retained) return ex * scale_x;
      const A d = keep == 0 ? A(0) : of_x - of_z;
      loss.v[1] += d * d;
      return a.forget_only ? A(0) : ex * scale_x - ez * scale_z + 2 * keep * d;
    };
    for_each_pack<span>(
        dx, classes, thread,
        [&](int i) {
          A v[size];
          visit(i, [&](A of_x, A of_z, bool retained, int k) { v[k] = gradient(of_x, of_z, retained); });
          store_raw<size>(dx + i, pack<T>(v));
        },
        [&](int i) { visit_one(i, [&](A of_x, A of_z, bool retained) { from_float(gradient(of_x, of_z, retained), dx[i]); }); });
    loss = reduce_row<span, 2>(loss);
    if (thread == 0) add_loss(sums[0], coef, static_cast<double>(scale_z * loss.v[0] + (keep == 0 ? A(0) : keep * loss.v[1])));
  }
  write_losses(sums, losses);
}

template <class T, class Z>
void run(const MaskedCrossEntropyInputs& in, const Tensor& dlogits, const Tensor& loss, double shift, bool forget_only) {
  using A = accumulator<T>;
  const Stream stream(in.logits);
  const int64_t classes = in.logits.size(1);
  MaskedRows<T, Z> a{
      matrix<const T>(in.logits), matrix<const Z>(in.teacher), matrix<T>(dlogits),
      in.index ? in.index->const_data_ptr<int64_t>() : nullptr, in.forget.const_data_ptr<bool>(), nullptr,
      in.coef.const_data_ptr<A>(), in.keep ? in.keep->const_data_ptr<A>() : nullptr, static_cast<A>(shift), forget_only};
  const Tensor mask = empty_like(in.logits, {mask_words(classes)}, ScalarType::Int);
  if (classes > TwoRows::WideRows<true>::capacity<double> - 2) { // more than any row in registers has, in double
    a.mask = reinterpret_cast<uint32_t*>(mask.mutable_data_ptr<int32_t>());
    launch(write_mask_kernel, (mask_words(classes) + 255) / 256, 256, stream, a.forget,
           reinterpret_cast<uint32_t*>(mask.mutable_data_ptr<int32_t>()), classes);
  }
  constexpr int size = pack_size<T>;
  const bool whole = !in.keep && has_whole_packs(a.logits, size) && has_whole_packs(a.teacher, size) && has_whole_packs(a.dlogits, size);
  const auto kernel = [](auto config, auto whole) { return register_masked_cross_entropy_kernel<decltype(config), T, Z, whole>; };
  launch_rows<TwoRows, false, T>(loss, a.logits, stream, kernel, streaming_masked_cross_entropy_kernel<T, Z>, a, whole);
}

std::tuple<Tensor, Tensor> masked_cross_entropy(
    const Tensor& logits, const Tensor& teacher, const Tensor& forget, const Tensor& coef,
    const std::optional<Tensor>& index, const std::optional<Tensor>& keep, double shift, bool forget_only) {
  const MaskedCrossEntropyInputs in = masked_cross_entropy_inputs(logits, teacher, forget, coef, index, keep);
  const Tensor dlogits = empty_like(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  const Tensor loss = torch::stable::new_empty(logits, {}, accumulator_of(logits));
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    if (in.teacher.scalar_type() == logits.scalar_type()) run<T, T>(in, dlogits, loss, shift, forget_only);
    else run<T, accumulator<T>>(in, dlogits, loss, shift, forget_only);
  });
  return {loss, dlogits};
}

} // namespace
} // namespace zsu::cuda

ZSU_CUDA_IMPL {
  m.impl("masked_cross_entropy", TORCH_BOX(&zsu::cuda::masked_cross_entropy));
}
