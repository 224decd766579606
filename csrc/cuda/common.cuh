// What the CUDA kernels share: number types, 128-bit access, reductions in a fixed order, launches.
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

// double stays double
__device__ inline float to_float(float v) { return v; }
__device__ inline double to_float(double v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_float(float v, float& to) { to = v; }
__device__ inline void from_float(double v, double& to) { to = v; }
__device__ inline void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// ---- memory --------------------------------------------------------------------------------------
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
  // inline assembly: the compiler splits the store of four floats into three
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}
template <class T>
__device__ bool is_aligned(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}
// Elements between the preceding aligned address and `row`.
template <class T>
__device__ int misaligned(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (Pack<T>::size - 1);
}

// Loads 16 bytes from any address, by one instruction if it is aligned.
template <class T>
__device__ Pack<T> load_anywhere(const T* p) {
  if (is_aligned(p)) return load_pack(p);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k) pack.v[k] = p[k];
  return pack;
}

// Stores those values of a pack that lie within the row.
template <class T>
__device__ void store_within(T* row, int i, int classes, const Pack<T>& pack) {
  if (i >= 0 && i + Pack<T>::size <= classes && is_aligned(row + i)) return store_pack(row + i, pack);
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k)
    if (i + k >= 0 && i + k < classes) row[i + k] = pack.v[k];
}

// Visits the n elements of a row with `threads_per_row` threads: pack(i) for every pack at an aligned
// address, scalar(i) for the elements before the first and after the last pack. Rows that start
// anywhere (C = 1001) therefore still move by 128 bits.
template <int threads_per_row, class T, class PackFunction, class ScalarFunction>
__device__ void for_each_pack(const T* row, int64_t n, int thread, PackFunction pack, ScalarFunction scalar) {
  constexpr int size = Pack<T>::size;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (size - 1);
  const int64_t leading = min(n, (size - misaligned) & (size - 1));
  const int64_t packs = (n - leading) / size;
  const int64_t end = leading + packs * size;
  if (thread < leading) scalar(static_cast<int64_t>(thread));
  for (int64_t p = thread; p < packs; p += threads_per_row) pack(leading + p * size);
  if (thread < n - end) scalar(end + thread);
}

// A row of logits in registers. Each thread holds `packs_per_thread` packs, `threads_per_row` packs apart:
// all its loads are in flight at once, and each logit is read once. Packs start at aligned addresses of
// the row; values outside the row are -inf.
template <int threads_per_row, int packs_per_thread, class T>
struct RegisterRow {
  static constexpr int size = Pack<T>::size;
  static constexpr int capacity = threads_per_row * packs_per_thread * size;
  Pack<T> packs[packs_per_thread];
  int first; // element index of the first value; negative if the row is misaligned

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

// If coef is 0, writes a loss and a gradient of 0, whatever the logits are, and returns true.
template <int threads_per_row, class T>
__device__ bool zero_if_unused(accumulator<T> coef, T* dx, accumulator<T>& row_loss, int64_t classes, int thread) {
  if (coef != 0) return false;
#pragma unroll 1
  for (int64_t i = thread; i < classes; i += threads_per_row) from_float(accumulator<T>(0), dx[i]);
  if (thread == 0) row_loss = 0;
  return true;
}

// ---- reductions over a row -----------------------------------------------------------------------
// What reduce_row combines: a value with shfl_xor(by, lanes) and merge(a, b).
template <class A>
struct Largest {
  A value;
  __device__ Largest shfl_xor(int by, unsigned lanes) const { return {__shfl_xor_sync(lanes, value, by)}; }
  __device__ static Largest merge(Largest a, Largest b) { return {a.value > b.value ? a.value : b.value}; }
};

template <class A>
struct Sum {
  A value;
  __device__ Sum shfl_xor(int by, unsigned lanes) const { return {__shfl_xor_sync(lanes, value, by)}; }
  __device__ static Sum merge(Sum a, Sum b) { return {a.value + b.value}; }
};

// The same reduction of student and teacher at once.
template <class V>
struct Pair {
  V student, teacher;
  __device__ Pair shfl_xor(int by, unsigned lanes) const { return {student.shfl_xor(by, lanes), teacher.shfl_xor(by, lanes)}; }
  __device__ static Pair merge(Pair a, Pair b) { return {V::merge(a.student, b.student), V::merge(a.teacher, b.teacher)}; }
};

// The lanes of its warp that share this thread's row, as a mask.
template <int threads_per_row>
__device__ unsigned row_lanes() {
  if constexpr (threads_per_row >= 32) return 0xffffffffu;
  else return ((1u << threads_per_row) - 1) << (threadIdx.x % 32 / threads_per_row * threads_per_row);
}

// Merges the values of a row's threads in one fixed order; all of them get the result. A row with more
// threads than a warp must have a block of its own.
template <int threads_per_row, class V>
__device__ V reduce_row(V v) {
#pragma unroll
  for (int by = (threads_per_row < 32 ? threads_per_row : 32) / 2; by > 0; by /= 2)
    v = V::merge(v, v.shfl_xor(by, row_lanes<threads_per_row>()));
  if constexpr (threads_per_row > 32) {
    __shared__ V of_warp[threads_per_row / 32];
    __syncthreads(); // a thread may still be reading the result of an earlier reduction
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    v = of_warp[0];
#pragma unroll
    for (int w = 1; w < threads_per_row / 32; ++w) v = V::merge(v, of_warp[w]);
  }
  return v;
}

// exp(a - b), with the part of a - b that rounding drops (two-sum): it would cost 2e-6 where logits
// differ by 40.
__device__ inline float exp_of_difference(float a, float b) {
  const float d = a - b, z = d - a;
  const float lost = (a - (d - z)) - (b + z);
  const float e = expf(d);
  return e == 0 ? 0.0f : fmaf(e, lost, e); // a = -inf: lost is NaN
}
__device__ inline double exp_of_difference(double a, double b) { return exp(a - b); }
// The same for logits of type T: 16-bit types use the hardware's exponential, accurate to 1e-5.
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
  // Adds the term of a logit x <= top. A NaN stays NaN; -inf adds nothing.
  __device__ void add(A x) { sum += x == -INFINITY && top == -INFINITY ? A(0) : exp_of_difference(x, top); }
};

// ---- launches ------------------------------------------------------------------------------------
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

// Sums the losses of rows, in one block and one order: `split` writes the sum over rows with a negative
// coef to losses[0] and that over the others to losses[1]; otherwise losses[0] is the sum over all.
template <class A, bool split>
__global__ void __launch_bounds__(1024) sum_rows_kernel(const A* row_loss, const A* coef, A* losses, int64_t rows) {
  double sums[2] = {0, 0};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < rows; i += 1024) {
    const bool forget = split && coef[i] < 0;
    sums[0] += forget ? static_cast<double>(row_loss[i]) : 0.0;
    sums[1] += forget ? 0.0 : static_cast<double>(row_loss[i]);
  }
  const double forget = reduce_row<1024>(Sum<double>{sums[0]}).value;
  const double retain = reduce_row<1024>(Sum<double>{sums[1]}).value;
  if (threadIdx.x == 0) {
    losses[0] = static_cast<A>(split ? forget : retain);
    if (split) losses[1] = static_cast<A>(retain);
  }
}

// How a block holds rows in registers: `block_rows` rows, `row_threads` threads per row, and
// `thread_values` classes per thread (half as many in double).
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
using WideRows = RowConfig<64, 1, 16>;  // up to 1024; other shapes: cuda_row_tiers.md of the benchmarks
using LongRows = RowConfig<512, 1, 16>; // up to 8192
constexpr int streaming_threads = 256;  // per row that does not fit in registers

// The rows of a matrix [rows, classes], `stride` elements apart.
template <class T>
struct Rows {
  const T* first;
  int64_t stride, rows, classes;
};

// Calls f with the first RowConfig that holds every row, wherever it starts, or returns false.
template <class T, class F>
bool with_row_config(const Rows<T>& r, F f) {
  const bool aligned = (reinterpret_cast<uintptr_t>(r.first) & 15) == 0 && r.stride % Pack<T>::size == 0;
  const int64_t capacity = r.classes + (aligned ? 0 : Pack<T>::size - 1);
  if constexpr (sizeof(T) == sizeof(double)) { // the other configurations would spill
    if (capacity > WideRows::Row<T>::capacity) return false;
    f(WideRows{});
  } else {
    if (capacity > LongRows::Row<T>::capacity) return false;
    if (capacity <= TinyRows::Row<T>::capacity) f(TinyRows{});
    else if (capacity <= ShortRows::Row<T>::capacity) f(ShortRows{});
    else if (capacity <= WideRows::Row<T>::capacity) f(WideRows{});
    else f(LongRows{});
  }
  return true;
}

// Launches kernel(first, stride, args..., rows, classes): register_kernel(RowConfig) if the rows fit in
// registers, else streaming_kernel.
template <class T, class RegisterKernel, class StreamingKernel, class... Args>
void launch_rows(
    const Rows<T>& r, cudaStream_t stream, RegisterKernel register_kernel, StreamingKernel streaming_kernel, Args... args) {
  if (r.rows == 0) return;
  const auto launch = [&](auto kernel, int64_t blocks, int threads) {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(r.first, r.stride, args..., r.rows, r.classes);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const bool fits = with_row_config(r, [&](auto config) {
    using Config = decltype(config);
    launch(register_kernel(config), (r.rows + Config::rows_per_block - 1) / Config::rows_per_block, Config::threads_per_block);
  });
  if (!fits) launch(streaming_kernel, r.rows, streaming_threads);
}

} // namespace zsu::cuda
