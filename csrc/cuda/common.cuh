// What the CUDA kernels share: number types, 16-byte access, reductions in one order, launches.
#pragma once

#include "../checks.h"
#include "../math.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

namespace zsu::cuda {

template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> using accumulator = typename Accumulator<T>::type;

__device__ inline float to_float(float v) { return v; }
__device__ inline double to_float(double v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_float(float v, float& to) { to = v; }
__device__ inline void from_float(double v, double& to) { to = v; }
__device__ inline void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// 16 bytes of T, moved by one 128-bit instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};
template <class T>
__device__ Pack<T> load_pack(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  return *reinterpret_cast<const Pack<T>*>(&bits);
}
template <class T>
__device__ void store_pack(T* p, const Pack<T>& pack) {
  uint32_t w[4];
  memcpy(w, &pack, 16);
  // by hand: the compiler splits the store of four floats into three
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}
template <class T>
__device__ bool is_aligned(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// Visit a row of n elements by `threads_per_row` threads: pack(i) for 16-byte blocks that start at an aligned
// address of `row`, scalar(i) for the elements before the first and after the last of them. So rows
// that start anywhere (C = 1001) still move by 128 bits.
template <int threads_per_row, class T, class PackFunction, class ScalarFunction>
__device__ void for_each_pack(const T* row, int64_t n, int thread, PackFunction pack, ScalarFunction scalar) {
  constexpr int size = Pack<T>::size;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (size - 1);
  const int64_t head = min(n, (size - misaligned) & (size - 1));
  const int64_t packs = (n - head) / size;
  const int64_t tail = head + packs * size;
  if (thread < head) scalar(static_cast<int64_t>(thread));
  for (int64_t p = thread; p < packs; p += threads_per_row) pack(head + p * size);
  if (thread < n - tail) scalar(tail + thread);
}

// Block of 16 bytes at any address: one load where it is aligned.
template <class T>
__device__ Pack<T> load_anywhere(const T* p) {
  if (is_aligned(p)) return load_pack(p);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k) pack.v[k] = p[k];
  return pack;
}

// A row of logits in registers: a thread holds `packs_per_thread` blocks of 16 bytes, `threads_per_row` blocks apart, so all
// its loads are under way at once and each logit is read once. Blocks start at aligned addresses of
// the row as it is read; outside it, values are -inf.
template <int threads_per_row, int packs_per_thread, class T>
struct RegisterRow {
  static constexpr int size = Pack<T>::size;
  static constexpr int capacity = threads_per_row * packs_per_thread * size;
  Pack<T> packs[packs_per_thread];
  int first; // element index of the first value held, below 0 in a row that starts off an aligned block

  __device__ RegisterRow(const T* row, int classes, int thread, int misaligned) : first(thread * size - misaligned) {
#pragma unroll
    for (int s = 0; s < packs_per_thread; ++s) {
      const int i = index(s);
      if (i >= 0 && i + size <= classes) {
        packs[s] = load_anywhere(row + i);
      } else {
#pragma unroll
        for (int k = 0; k < size; ++k) {
          from_float(accumulator<T>(-INFINITY), packs[s].v[k]);
          if (i + k >= 0 && i + k < classes) packs[s].v[k] = row[i + k];
        }
      }
    }
  }
  __device__ int index(int s) const { return first + s * threads_per_row * size; }
  __device__ accumulator<T> at(int s, int k) const { return to_float(packs[s].v[k]); }
};

// As many elements as a row may start behind an aligned address.
template <class T>
__device__ int misaligned(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (Pack<T>::size - 1);
}

// Block of values to a row, where they lie in it.
template <class T>
__device__ void store_within(T* row, int i, int classes, const Pack<T>& pack) {
  if (i >= 0 && i + Pack<T>::size <= classes && is_aligned(row + i)) return store_pack(row + i, pack);
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k)
    if (i + k >= 0 && i + k < classes) row[i + k] = pack.v[k];
}

// Whether a row counts nothing; then its gradient and loss are 0, whatever its logits are.
template <int threads_per_row, class T>
__device__ bool zero_if_unused(accumulator<T> coef, T* dx, accumulator<T>& row_loss, int64_t classes, int thread) {
  if (coef != 0) return false;
#pragma unroll 1
  for (int64_t i = thread; i < classes; i += threads_per_row) from_float(accumulator<T>(0), dx[i]);
  if (thread == 0) row_loss = 0;
  return true;
}

// Vec of this thread's row in its warp, as a mask.
template <int threads_per_row>
__device__ unsigned row_lanes() {
  if constexpr (threads_per_row >= 32) return 0xffffffffu;
  else return ((1u << threads_per_row) - 1) << (threadIdx.x % 32 / threads_per_row * threads_per_row);
}

// All `threads_per_row` threads of a row get the same result, from one order of operations. Where they are more
// than a warp, the row has a block of its own.
template <int threads_per_row, class V, class F>
__device__ V reduce_row(V v, F combine) {
#pragma unroll
  for (int by = (threads_per_row < 32 ? threads_per_row : 32) / 2; by > 0; by /= 2) v = combine(v, v.shfl_xor(by, row_lanes<threads_per_row>()));
  if constexpr (threads_per_row > 32) {
    __shared__ V of_warp[threads_per_row / 32];
    __syncthreads(); // an earlier reduction may still be read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    v = of_warp[0];
#pragma unroll
    for (int w = 1; w < threads_per_row / 32; ++w) v = combine(v, of_warp[w]);
  } else {
    __syncwarp(row_lanes<threads_per_row>()); // as __syncthreads above: what the row's threads have read, they may now overwrite
  }
  return v;
}

template <class A>
struct Largest {
  A value;
  __device__ Largest shfl_xor(int by, unsigned lanes) const { return {__shfl_xor_sync(lanes, value, by)}; }
  __device__ static Largest of(Largest a, Largest b) { return {a.value > b.value ? a.value : b.value}; }
};

template <class A>
struct Sum {
  A value;
  __device__ Sum shfl_xor(int by, unsigned lanes) const { return {__shfl_xor_sync(lanes, value, by)}; }
  __device__ friend Sum operator+(Sum a, Sum b) { return {a.value + b.value}; }
};

// exp(a - b) with the part of a - b that rounding drops (two-sum): logits 40 apart would cost 2e-6.
__device__ inline float exp_of_difference(float a, float b) {
  const float d = a - b, z = d - a;
  const float lost = (a - (d - z)) - (b + z);
  const float e = expf(d);
  return e == 0 ? 0.0f : fmaf(e, lost, e); // a = -inf: lost is NaN
}
__device__ inline double exp_of_difference(double a, double b) { return exp(a - b); }
// The same for logits of type T: those of 16 bits get the hardware's exponential, good to 1e-5.
template <class T>
__device__ accumulator<T> exp_of_logits(accumulator<T> a, accumulator<T> b) {
  if constexpr (sizeof(T) == 2) return __expf(a - b);
  else return exp_of_difference(a, b);
}

// Running softmax denominator (Milakov and Gimelshein, 2018): sum of exp(x - top).
template <class A>
struct Softmax {
  A top, sum;
  __device__ static Softmax none() { return {-INFINITY, 0}; }
  __device__ Softmax shfl_xor(int by, unsigned lanes) const {
    return {__shfl_xor_sync(lanes, top, by), __shfl_xor_sync(lanes, sum, by)};
  }
  __device__ void rescale(A to) { // -inf - -inf would be NaN
    if (to > top) {
      sum *= top == -INFINITY ? A(0) : exp_of_difference(top, to);
      top = to;
    }
  }
  __device__ static Softmax merge(Softmax a, Softmax b) {
    const A top = a.top > b.top ? a.top : b.top;
    a.rescale(top);
    b.rescale(top);
    return {top, a.sum + b.sum};
  }
  // A term whose logit is already covered by top. NaN stays; -inf adds nothing.
  __device__ void add(A x) { sum += x == -INFINITY && top == -INFINITY ? A(0) : exp_of_difference(x, top); }
};

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
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

// Sum of row losses: [0] for negative coef and [1] for others, or all in [0]. One block, one order.
template <class A, bool split>
__global__ void __launch_bounds__(1024) sum_rows(const A* row_loss, const A* coef, A* losses, int64_t rows) {
  double sums[2] = {0, 0};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < rows; i += 1024) {
    const bool forget = split && coef[i] < 0;
    sums[0] += forget ? static_cast<double>(row_loss[i]) : 0.0;
    sums[1] += forget ? 0.0 : static_cast<double>(row_loss[i]);
  }
  const auto plus = [](Sum<double> a, Sum<double> b) { return a + b; };
  const double forget = reduce_row<1024>(Sum<double>{sums[0]}, plus).value;
  const double retain = reduce_row<1024>(Sum<double>{sums[1]}, plus).value;
  if (threadIdx.x == 0) {
    losses[0] = static_cast<A>(split ? forget : retain);
    if (split) losses[1] = static_cast<A>(retain);
  }
}

// How rows that fit in registers are dealt out: `rows` of them a block, `threads_per_row` threads each, which hold
// `values` classes each (half as many of double).
template <int row_threads, int block_rows, int thread_values>
struct RowConfig {
  static_assert(row_threads <= 32 || block_rows == 1, "see reduce_row");
  static constexpr int threads_per_row = row_threads, threads_per_block = row_threads * block_rows;
  static constexpr int64_t rows_per_block = block_rows;
  template <class T>
  static constexpr int packs_per_thread = (sizeof(T) == 8 ? thread_values / 2 : thread_values) / Pack<T>::size;
  template <class T>
  using Row = RegisterRow<threads_per_row, packs_per_thread<T>, T>;
};
using TinyRows = RowConfig<4, 64, 8>;   // up to 32 classes
using ShortRows = RowConfig<32, 8, 8>;  // up to 256
using WideRows = RowConfig<64, 1, 16>;  // up to 1024; other shapes: benchmarks/results/cuda_row_tiers.md
using LongRows = RowConfig<512, 1, 16>; // up to 8192

// Calls launch(config) with the first config that all rows fit in, wherever they start, or otherwise().
template <class T, class Launch, class Otherwise>
void by_row_config(const T* first_row, int64_t row_stride, int64_t classes, Launch launch, Otherwise otherwise) {
  const bool aligned = (reinterpret_cast<uintptr_t>(first_row) & 15) == 0 && row_stride % Pack<T>::size == 0;
  const int64_t room = classes + (aligned ? 0 : Pack<T>::size - 1);
  if (room > LongRows::Row<T>::capacity) return otherwise();
  if constexpr (sizeof(T) == sizeof(double)) { // which would spill with the others
    room <= WideRows::Row<T>::capacity ? launch(WideRows{}) : otherwise();
  } else {
    if (room <= TinyRows::Row<T>::capacity) launch(TinyRows{});
    else if (room <= ShortRows::Row<T>::capacity) launch(ShortRows{});
    else if (room <= WideRows::Row<T>::capacity) launch(WideRows{});
    else launch(LongRows{});
  }
}

constexpr int streaming_threads = 256; // threads of a row that does not fit

} // namespace zsu::cuda
