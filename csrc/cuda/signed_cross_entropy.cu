#include "rows.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu::cuda {
namespace {

template <class T>
struct SignedRows {
  Matrix<const T> logits;
  Matrix<T> dlogits;
  const int64_t* targets;
  const accumulator<T>* coefs;
};

// Negative for a target that is no class.
__device__ inline int checked_target(int64_t target, int classes) {
  return target >= 0 && target < classes ? static_cast<int>(target) : INT32_MIN;
}

// Rows that fit in registers: each logit is read once and its exponential taken once. All loads of a row
// start before anything waits for one.
template <class config, class T, bool whole>
__global__ void __launch_bounds__(config::threads_per_block, blocks_per_processor<config, sizeof(T) == 8 ? 64 : whole ? 48 : 56>)
register_signed_cross_entropy_kernel(SignedRows<T> a, double* losses) {
  using A = accumulator<T>;
  constexpr int span = config::threads_per_row, size = pack_size<T>, packs = config::template packs<T>;
  constexpr int rows_per_block = config::rows_per_block;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  __shared__ double sums[rows_per_block][2];
  __shared__ A target_logit[rows_per_block];
  const int thread = threadIdx.x % span, turn = threadIdx.x / span, classes = a.logits.classes;
  if (thread == 0) sums[turn][0] = sums[turn][1] = 0;

#pragma unroll 1
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + turn; row < a.logits.rows;
       row += static_cast<int64_t>(gridDim.x) * rows_per_block) {
    const T* logits = a.logits.row(row);
    T* dlogits = a.dlogits.row(row);
    const int first = thread * size - (whole ? 0 : misaligned(logits));
    RegisterRow<T, size, packs, span, whole> x{logits, first, classes, true, a.logits.is_edge(row)};
    x.load();
    const A coef = a.coefs[row];
    const int target = checked_target(a.targets[row], classes);
    if (coef == 0) { // whatever the logits are
      for (int i = thread; i < classes; i += span) from_float(A(0), dlogits[i]);
      continue;
    }
    x.mask_ends();

    // the target is taken out: the sum over the others is 1 - p; subtracting p from 1 would lose digits
    bool has_target = false;
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      if (static_cast<unsigned>(target - x.index(s)) >= size) continue;
      has_target = true;
#pragma unroll
      for (int k = 0; k < size; ++k) {
        if (x.index(s) + k != target) continue;
        T none;
        from_float(lowest, none);
        target_logit[turn] = to_float(x.raw[s].get(k));
        x.raw[s].set(k, none);
      }
    }
    A v[packs][size];
    Largest<A, 1> largest{{lowest}};
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      unpack(x.raw[s], v[s]);
#pragma unroll
      for (int k = 0; k < size; ++k) largest.v[0] = larger(largest.v[0], v[s][k]);
    }
    largest = reduce_row<span, 0>(largest);
    const A of_target = target_logit[turn], top = larger(largest.v[0], of_target);
    const Exp<T> exp(top);
    Sum<A, 1> others{{0}};
#pragma unroll
    for (int s = 0; s < packs; ++s)
#pragma unroll
      for (int k = 0; k < size; ++k) others.v[0] += v[s][k] = exp(v[s][k]);
    const A rest = reduce_row<span, 1>(others).v[0], denominator = exp(of_target) + rest;

    // NaN for an invalid target: the caller must notice it, and a kernel cannot raise
    const A factor = target < 0 ? std::numeric_limits<A>::quiet_NaN() : quotient(coef, denominator);
#pragma unroll
    for (int s = 0; s < packs; ++s) {
#pragma unroll
      for (int k = 0; k < size; ++k) v[s][k] *= factor;
      store_values<whole>(dlogits, x.index(s), classes, v[s]);
    }
    if (has_target) from_float(-rest * factor, dlogits[target]);
    if (thread == 0) {
      const A unit = exp.unit();
      const A loss = coef * zsu::row_loss(log(denominator / unit), of_target - top, rest / unit, denominator / unit);
      add_loss(sums[turn], coef, static_cast<double>(target < 0 ? factor : loss));
    }
  }
  write_losses(sums, losses);
}

// Longer rows, one per block: read twice, the second time from cache.
template <class T>
__global__ void __launch_bounds__(streaming_threads<T>, 2) streaming_signed_cross_entropy_kernel(SignedRows<T> a, double* losses) {
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
    const A coef = a.coefs[row];
    if (coef == 0) { // whatever the logits are
      for (int i = thread; i < classes; i += span) from_float(A(0), dx[i]);
      continue;
    }
    const int target = checked_target(a.targets[row], classes);
    const bool valid = target >= 0;
    const A target_logit = valid ? static_cast<A>(to_float(x[target])) : A(0);

    Softmax<T> others;
    for_each_pack<span>(
        x, classes, thread,
        [&](int i) {
          A v[size];
          unpack(load_raw<size>(x + i), v);
          A highest = v[0];
#pragma unroll
          for (int k = 1; k < size; ++k) highest = larger(highest, v[k]);
          others.rescale(highest);
#pragma unroll
          for (int k = 0; k < size; ++k)
            if (i + k != target) others.add(v[k]);
        },
        [&](int i) {
          others.rescale(to_float(x[i]));
          if (i != target) others.add(to_float(x[i]));
        });
    // of all classes: the target took part in rescaling
    const A top = reduce_row<span, 0>(Largest<A, 1>{{others.top}}).v[0];
    others.rescale(top);
    const A rest = reduce_row<span, 1>(Sum<A, 1>{{others.sum}}).v[0];
    const A denominator = exp_of_logit<T>(target_logit, top) + rest;
    const A factor = valid ? quotient(coef, denominator) : std::numeric_limits<A>::quiet_NaN();
    if (thread == 0) {
      const A loss = zsu::row_loss(log(denominator), target_logit - top, rest, denominator);
      add_loss(sums[0], coef, valid ? static_cast<double>(coef * loss) : static_cast<double>(factor));
    }
    const auto gradient = [&](A value, bool is_target) { return factor * (is_target ? -rest : exp_of_logit<T>(value, top)); };
    for_each_pack<span>(
        dx, classes, thread,
        [&](int i) {
          A v[size];
          unpack(load_anywhere<size>(x + i), v);
#pragma unroll
          for (int k = 0; k < size; ++k) v[k] = gradient(v[k], i + k == target);
          store_raw<size>(dx + i, pack<T>(v));
        },
        [&](int i) { from_float(gradient(to_float(x[i]), i == target), dx[i]); });
  }
  write_losses(sums, losses);
}

std::tuple<Tensor, Tensor> signed_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& coef) {
  const SignedCrossEntropyInputs in = signed_cross_entropy_inputs(logits, target, coef);
  const Stream stream(logits);
  const Tensor dlogits = empty_like(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  const Tensor losses = empty_like(logits, {2}, accumulator_of(logits));
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    const SignedRows<T> rows{
        matrix<const T>(in.logits), matrix<T>(dlogits), in.target.const_data_ptr<int64_t>(),
        in.coef.const_data_ptr<accumulator<T>>()};
    launch_rows<OneRow, true, T>(
        losses, rows.logits, stream,
        [](auto config, auto whole) { return register_signed_cross_entropy_kernel<decltype(config), T, whole>; },
        streaming_signed_cross_entropy_kernel<T>, rows,
        has_whole_packs(rows.logits, pack_size<T>) && has_whole_packs(rows.dlogits, pack_size<T>));
  });
  return {losses, dlogits};
}

} // namespace
} // namespace zsu::cuda

ZSU_CUDA_IMPL {
  m.impl("signed_cross_entropy", TORCH_BOX(&zsu::cuda::signed_cross_entropy));
}
