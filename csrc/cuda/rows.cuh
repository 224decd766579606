// How rows of logits are dealt out to blocks, and kernels launched.
#pragma once

#include "../checks.h"
#include "device.cuh"
#include "launch.cuh"

namespace zsu::cuda {

// How a block holds rows in registers: `block_rows` rows, `row_threads` threads per row, and
// `thread_values` classes per thread (half as many in double).
template <int row_threads, int block_rows, int thread_values>
struct RowConfig {
  static_assert(row_threads <= 32 || block_rows == 1, "see reduce_row");
  static constexpr int threads_per_row = row_threads, threads_per_block = row_threads * block_rows;
  static constexpr int rows_per_block = block_rows;
  template <class T>
  static constexpr int packs = (sizeof(T) == 8 ? thread_values / 2 : thread_values) / pack_size<T>;
  template <class T>
  static constexpr int capacity = threads_per_row * packs<T> * pack_size<T>;
};
// Blocks to fit on an SM, for __launch_bounds__, if a thread may have that many registers: each quarter of an
// SM has 16,384 of them.
template <class config, int registers>
constexpr int blocks_per_processor = 16384 / (32 * registers) * 4 * 32 / config::threads_per_block;

using TinyRows = RowConfig<4, 64, 8>;  // up to 32 classes
using ShortRows = RowConfig<32, 8, 8>; // up to 256
// Up to 1024 and up to 8192 classes; other shapes: cuda_row_tiers.md of the benchmarks. Student and teacher
// together take twice the registers, and with the changes of retained logits three times.
struct OneRow {
  template <bool whole> using WideRows = RowConfig<64, 1, 16>;
  template <bool whole> using LongRows = RowConfig<512, 1, 16>;
};
struct TwoRows {
  template <bool whole> using WideRows = std::conditional_t<whole, RowConfig<64, 1, 16>, RowConfig<128, 1, 8>>;
  template <bool whole> using LongRows = RowConfig<1024, 1, 8>;
};
// Per row that does not fit in registers: an SM holds two such blocks, so that an H100 has 264 rows in flight,
// of 32,000 float32 classes 34 MB, and the second reading finds them in its L2 cache.
template <class T>
constexpr int streaming_threads = sizeof(T) == 8 ? 512 : 1024; // double needs more than 64 registers

// A matrix [rows, classes], its rows `stride` elements apart.
template <class T>
struct Matrix {
  T* first;
  int64_t stride, rows;
  int classes;

  __device__ T* row(int64_t i) const { return first + i * stride; }
  // Whether packs that reach beyond row i may leave the tensor.
  __device__ bool is_edge(int64_t i) const { return i == 0 || i == rows - 1 || stride < classes; }
};
// Whether packs of n elements start at addresses aligned to 16 bytes in every row, and none is cut off.
template <class T>
bool has_whole_packs(const Matrix<T>& m, int n) {
  const bool aligned = (reinterpret_cast<uintptr_t>(m.first) & 15) == 0;
  return aligned && m.stride % pack_size<std::remove_const_t<T>> == 0 && m.classes % n == 0;
}
template <class T>
Matrix<T> matrix(const Tensor& t) {
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &data));
  // indices within a row are int, so that they take half the registers
  STD_TORCH_CHECK(t.size(1) < (int64_t{1} << 31) - 65536, "rows must be shorter than 2^31 - 65536");
  return {static_cast<T*>(data), t.size(0) > 1 ? t.stride(0) : t.size(1), t.size(0), static_cast<int>(t.size(1))};
}

// Calls f with a value of the element type of t.
template <class F>
void dispatch(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: return f(float{});
  }
}

// Adds up the sums of blocks, in one block and one order: `split` writes the sum over rows with a negative
// coef to losses[0] and that over the others to losses[1]; otherwise losses[0] is the sum over all.
template <class A, bool split>
__global__ void __launch_bounds__(256) sum_losses_kernel(const double* sums, A* losses, int64_t blocks) {
  Sum<double, 2> sum{{0, 0}};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < blocks; i += 256) {
    sum.v[0] += sums[2 * i];
    sum.v[1] += sums[2 * i + 1];
  }
  sum = reduce_row<256, 0>(sum);
  if (threadIdx.x == 0) {
    losses[0] = static_cast<A>(split ? sum.v[0] : sum.v[0] + sum.v[1]);
    if (split) losses[1] = static_cast<A>(sum.v[1]);
  }
}

// Calls f with the first RowConfig that holds every row, wherever it starts, or returns false.
template <class Configs, bool whole, class T, class F>
bool with_row_config(const Matrix<const T>& m, F f) {
  const bool aligned = (reinterpret_cast<uintptr_t>(m.first) & 15) == 0 && m.stride % pack_size<T> == 0;
  const int capacity = m.classes + (aligned ? 0 : pack_size<T> - 1);
  using WideRows = typename Configs::template WideRows<whole>;
  using LongRows = typename Configs::template LongRows<whole>;
  if constexpr (sizeof(T) == sizeof(double)) { // the other configurations would spill
    if (capacity > WideRows::template capacity<T>) return false;
    f(WideRows{});
  } else {
    if (capacity > LongRows::template capacity<T>) return false;
    if (capacity <= TinyRows::capacity<T>) f(TinyRows{});
    else if (capacity <= ShortRows::capacity<T>) f(ShortRows{});
    else if (capacity <= WideRows::template capacity<T>) f(WideRows{});
    else f(LongRows{});
  }
  return true;
}

// Launches kernel(args, sums) on no more blocks than fit on the device: register_kernel(RowConfig, whole) if
// the rows of logits fit in registers, else streaming_kernel. Blocks take turns with rows, and `losses` gets
// the sums of their losses.
template <class Configs, bool split, class T, class RegisterKernel, class StreamingKernel, class Args>
void launch_rows(
    const Tensor& losses, const Matrix<const T>& logits, const Stream& stream, RegisterKernel register_kernel,
    StreamingKernel streaming_kernel, const Args& args, bool whole) {
  using A = accumulator<T>;
  const auto run = [&](auto kernel, int64_t rows_per_block, int threads) {
    const int64_t wanted = (logits.rows + rows_per_block - 1) / rows_per_block;
    const int64_t blocks = wanted == 0 ? 0 : resident_blocks(kernel, threads, wanted);
    const Tensor sums = empty_like(losses, {blocks, 2}, ScalarType::Double);
    double* of_block = sums.mutable_data_ptr<double>();
    if (blocks > 0) launch(kernel, blocks, threads, stream, args, of_block);
    launch(sum_losses_kernel<A, split>, 1, 256, stream, of_block, losses.mutable_data_ptr<A>(), blocks);
  };
  const auto try_registers = [&](auto constant) {
    return with_row_config<Configs, constant>(logits, [&](auto config) {
      using Config = decltype(config);
      run(register_kernel(config, constant), Config::rows_per_block, Config::threads_per_block);
    });
  };
  const bool fits = whole ? try_registers(std::true_type{}) : try_registers(std::false_type{});
  if (!fits) run(streaming_kernel, 1, streaming_threads<T>);
}

} // namespace zsu::cuda
