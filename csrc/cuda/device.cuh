// What the CUDA kernels compute with: number types, 128-bit access, exponentials, reductions in a fixed
// order. Nothing here needs torch: the tests compile it for the CPU too (tests/ops/cuda_emulator).
#pragma once

#include "../math.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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
// Elements of T that one 128-bit instruction moves.
template <class T> constexpr int pack_size = 16 / static_cast<int>(sizeof(T));

// n neighbouring elements of T as they lie in memory, from an address aligned to 16 bytes.
template <class T, int n>
struct Raw {
  static constexpr int words = n * static_cast<int>(sizeof(T)) / 4;
  uint32_t w[words];

  __device__ void set(int k, T value) { memcpy(reinterpret_cast<char*>(w) + k * sizeof(T), &value, sizeof(T)); }
  __device__ T get(int k) const {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(w) + k * sizeof(T), sizeof(T));
    return value;
  }
};

template <class T>
__device__ bool is_aligned(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}
// Elements between the preceding aligned address and `row`.
template <class T>
__device__ int misaligned(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (pack_size<T> - 1);
}

// Inline assembly: the compiler moves loads behind the first use of others, and splits a store of four
// floats into three. Loads keep `raw` as it is if they are not `wanted`.
template <int n, class T>
__device__ void load_raw(const T* p, bool wanted, Raw<T, n>& raw) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int k = 0; k < raw.words; k += 4)
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(raw.w[k]), "+r"(raw.w[k + 1]), "+r"(raw.w[k + 2]), "+r"(raw.w[k + 3])
                 : "l"(reinterpret_cast<const char*>(p) + 4 * k), "r"(static_cast<int>(wanted)));
#else
  if (wanted) memcpy(raw.w, p, sizeof raw);
#endif
}
template <int n, class T>
__device__ Raw<T, n> load_raw(const T* p) {
  Raw<T, n> raw;
  load_raw<n>(p, true, raw);
  return raw;
}
// Loads n elements from any address.
template <int n, class T>
__device__ Raw<T, n> load_anywhere(const T* p) {
  Raw<T, n> raw;
  if (is_aligned(p)) return load_raw<n>(p);
#pragma unroll
  for (int k = 0; k < n; ++k) raw.set(k, p[k]);
  return raw;
}
template <int n, class T>
__device__ void store_raw(T* p, const Raw<T, n>& raw) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int k = 0; k < raw.words; k += 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<char*>(p) + 4 * k),
                 "r"(raw.w[k]), "r"(raw.w[k + 1]), "r"(raw.w[k + 2]), "r"(raw.w[k + 3]) : "memory");
#else
  memcpy(p, raw.w, sizeof raw);
#endif
}

__device__ inline float as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
template <class T, int n>
__device__ void unpack(const Raw<T, n>& raw, accumulator<T> (&v)[n]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int k = 0; k < raw.words; ++k) {
      v[2 * k] = as_float(raw.w[k] << 16);
      v[2 * k + 1] = as_float(raw.w[k] & 0xffff0000u);
    }
  } else {
    T values[n];
    memcpy(values, raw.w, sizeof raw);
#pragma unroll
    for (int k = 0; k < n; ++k) v[k] = to_float(values[k]);
  }
}
// Rounds two 16-bit numbers by one instruction.
template <class T, int n>
__device__ Raw<T, n> pack(const accumulator<T> (&v)[n]) {
  Raw<T, n> raw;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < raw.words; ++k) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(v[2 * k], v[2 * k + 1]);
        memcpy(&raw.w[k], &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * k], v[2 * k + 1]);
        memcpy(&raw.w[k], &pair, 4);
      }
    }
  } else {
    memcpy(raw.w, v, sizeof raw);
  }
  return raw;
}

// A row of numbers in registers. A thread holds `packs` times n of them, `span` * n apart, each n at an
// aligned address of the row of logits. `load` only starts loads; nothing waits before `values`. In `whole`
// rows every pack lies within the row or outside; in other rows, ends are masked.
template <class T, int n, int packs, int span, bool whole>
struct RegisterRow {
  const T* row;
  int first, classes; // index of the thread's first element: negative if the row is misaligned
  bool direct;        // packs are at aligned addresses of this row too; otherwise it is read one by one
  bool guarded;       // what lies beside the row is not of its tensor, so that it must not be read
  Raw<T, n> raw[packs];

  __device__ int index(int s) const { return first + s * span * n; }
  __device__ bool is_partial(int i) const { return i < 0 || i + n > classes; }
  __device__ void load() {
    const T* at = row + first;
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      const int i = index(s);
      const bool wanted = i < classes && (whole || (direct && !(guarded && is_partial(i))));
      T lowest;
      from_float(-std::numeric_limits<accumulator<T>>::infinity(), lowest);
#pragma unroll
      for (int k = 0; k < n; ++k) raw[s].set(k, lowest);
      load_raw<n>(at + s * span * n, wanted, raw[s]);
    }
  }
  // Makes elements outside the row -inf.
  __device__ void mask_ends() {
    if constexpr (!whole) {
#pragma unroll
      for (int s = 0; s < packs; ++s) {
        const int i = index(s);
        if (direct && !is_partial(i)) continue;
#pragma unroll
        for (int k = 0; k < n; ++k) {
          T value;
          from_float(-std::numeric_limits<accumulator<T>>::infinity(), value);
          if (i + k >= 0 && i + k < classes) value = guarded || !direct ? row[i + k] : raw[s].get(k);
          raw[s].set(k, value);
        }
      }
    }
  }
};

// Stores those of n values at index i that lie within the row.
template <bool whole, class T, int n>
__device__ void store_values(T* row, int i, int classes, const accumulator<T> (&v)[n]) {
  if (i >= classes) return;
  if (whole || (i >= 0 && i + n <= classes && is_aligned(row + i))) {
    store_raw<n>(row + i, pack<T>(v));
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (i + k >= 0 && i + k < classes) from_float(v[k], row[i + k]);
  }
}

// Visits the n elements of a row with `threads_per_row` threads: pack(i) for every pack at an aligned
// address, scalar(i) for the elements before the first and after the last pack. Rows that start
// anywhere (C = 1001) therefore still move by 128 bits.
template <int threads_per_row, class T, class PackFunction, class ScalarFunction>
__device__ void for_each_pack(const T* row, int n, int thread, PackFunction pack, ScalarFunction scalar) {
  constexpr int size = pack_size<T>;
  const int leading = min(n, (size - misaligned(row)) & (size - 1));
  const int end = leading + (n - leading) / size * size;
  if (thread < leading) scalar(thread);
#pragma unroll 1 // more would spill
  for (int i = leading + thread * size; i < end; i += threads_per_row * size) pack(i);
  if (thread < n - end) scalar(end + thread);
}

// ---- which classes are retained ------------------------------------------------------------------
// A bit per class, 1 if it is retained, after 32 zero bits and before at least 32.
__host__ __device__ inline int64_t mask_words(int64_t classes) { return (classes + 31) / 32 + 2; }

__device__ inline void write_mask(const bool* forget, uint32_t* words, int64_t classes, int64_t thread, int64_t threads) {
  for (int64_t at = thread; at < mask_words(classes); at += threads) {
    const int64_t begin = at * 32 - 32;
    uint32_t forgotten = 0xffffffffu;
    if (begin >= 0 && begin + 32 <= classes && is_aligned(forget + begin)) {
      const Raw<bool, 32> bytes = load_raw<32>(forget + begin);
      forgotten = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) // gathers the lowest bits of four bytes
        forgotten |= ((bytes.w[k] & 0x01010101u) * 0x10204080u >> 28) << (4 * k);
    } else if (begin >= 0) {
      for (int k = 0; k < 32; ++k)
        if (begin + k < classes && !forget[begin + k]) forgotten &= ~(1u << k);
    }
    words[at] = ~forgotten;
  }
}
// The bits of classes i, i + 1, ... in the lowest places; i > -32.
__device__ inline uint32_t mask_bits(const uint32_t* words, int i) {
  const uint32_t* at = words + (i + 32) / 32;
  return __funnelshift_r(at[0], at[1], static_cast<uint32_t>(i & 31));
}

// ---- exponentials --------------------------------------------------------------------------------
// 2^x, by the hardware: relative error 2^-22, 0 below 2^-126.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0.0f : exp2f(x);
#endif
}
__device__ inline float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b); // 2 ulp; a and b are far from overflow
#else
  return a / b;
#endif
}
__device__ inline double quotient(double a, double b) { return a / b; }

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// exp(x - top) of x <= top. float keeps the part of x - top that rounding drops (two-sum): it would cost
// 2e-6 where logits differ by 40.
__device__ inline float exp_of_difference(float x, float top) {
  const float d = x - top, z = d - x, lost = (x - (d - z)) - (top + z);
  const float t = d * 1.44269504f;
  const float low = fmaf(d, 1.44269504f, -t) + fmaf(d, 1.925963033e-8f, lost * 1.44269504f);
  const float e = exp2_fast(t);
  return e == 0 ? 0.0f : fmaf(e * low, 0.693147181f, e); // x = -inf: low is NaN
}
__device__ inline double exp_of_difference(double x, double top) { return exp(x - top); }

// exp(x - top) of logits of type T. 16-bit types fold the subtraction into one multiply-add, whose
// constant is rounded: all exponentials of a row have the factor `unit` then, and all exponents the same
// error, which only a loss has to undo.
template <class T>
struct Exp {
  using A = accumulator<T>;
  static constexpr bool folded = sizeof(T) == 2;
  static constexpr A base_log = folded ? A(0.69314718055994531) : A(1); // log of the base of `exponent`
  A top, scaled;
  __device__ explicit Exp(A top) : top(top), scaled(top * A(1.44269504)) {}
  __device__ A exponent(A x) const {
    if constexpr (folded) return fmaf(x, 1.44269504f, -scaled);
    else return x - top;
  }
  __device__ A operator()(A x) const {
    if constexpr (folded) return exp2_fast(exponent(x));
    else return exp_of_difference(x, top);
  }
  __device__ A unit() const {
    if constexpr (folded) return (*this)(top);
    else return 1;
  }
};

// ---- reductions over a row -----------------------------------------------------------------------
// What reduce_row combines: n numbers with their largest values, or their sums.
template <class A, int n>
struct Largest {
  A v[n];
  __device__ static A merge(A a, A b) { return larger(a, b); }
};
template <class A, int n>
struct Sum {
  A v[n];
  __device__ static A merge(A a, A b) { return a + b; }
};

// The lanes of its warp that share this thread's row, as a mask.
template <int threads_per_row>
__device__ unsigned row_lanes() {
  if constexpr (threads_per_row >= 32) return 0xffffffffu;
  else return ((1u << threads_per_row) - 1) << (threadIdx.x % 32 / threads_per_row * threads_per_row);
}

// Merges the values of a row's threads in one fixed order; all of them get the result. A row with more
// threads than a warp has a block of its own, and two successive reductions need two `places` for it:
// then one barrier each is enough.
template <int threads_per_row, int place, template <class, int> class V, class A, int n>
__device__ V<A, n> reduce_row(V<A, n> x) {
  const unsigned lanes = row_lanes<threads_per_row>();
#pragma unroll
  for (int by = (threads_per_row < 32 ? threads_per_row : 32) / 2; by > 0; by /= 2)
#pragma unroll
    for (int k = 0; k < n; ++k) x.v[k] = V<A, n>::merge(x.v[k], __shfl_xor_sync(lanes, x.v[k], by));
  if constexpr (threads_per_row > 32) {
    constexpr int warps = threads_per_row / 32;
    __shared__ V<A, n> of_warp[warps];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    if constexpr (warps <= 4) {
      x = of_warp[0];
#pragma unroll
      for (int w = 1; w < warps; ++w)
#pragma unroll
        for (int k = 0; k < n; ++k) x.v[k] = V<A, n>::merge(x.v[k], of_warp[w].v[k]);
    } else {
      x = of_warp[threadIdx.x % warps];
#pragma unroll
      for (int by = warps / 2; by > 0; by /= 2)
#pragma unroll
        for (int k = 0; k < n; ++k) x.v[k] = V<A, n>::merge(x.v[k], __shfl_xor_sync(lanes, x.v[k], by));
    }
  } else {
    // As the block's barrier above, it orders what the row's threads write to shared memory before and read
    // after it. Without it, nvcc also computes 16-bit exponentials a second time (sm_80).
    __syncwarp(lanes);
  }
  return x;
}

// exp(x - top) of a logit of type T that is read again: the same as `Exp` without its factor.
template <class T>
__device__ accumulator<T> exp_of_logit(accumulator<T> x, accumulator<T> top) {
  if constexpr (sizeof(T) == 2) return exp2_fast((x - top) * 1.44269504f);
  else return exp_of_difference(x, top);
}

// Running softmax denominator (Milakov and Gimelshein, 2018) of logits of type T: sum of exp(x - top).
template <class T>
struct Softmax {
  using A = accumulator<T>;
  static constexpr A lowest = -std::numeric_limits<A>::infinity();
  A top = lowest, sum = 0;
  __device__ void rescale(A to) { // -inf - -inf would be NaN
    if (to > top) {
      sum *= top == lowest ? A(0) : exp_of_difference(top, to);
      top = to;
    }
  }
  // Adds the term of a logit x <= top. A NaN stays NaN; -inf adds nothing.
  __device__ void add(A x) { sum += x == lowest ? A(0) : exp_of_logit<T>(x, top); }
};

// ---- losses of a block ---------------------------------------------------------------------------
// Adds a row's loss to the sum of its kind, kept by the first thread of the rows it takes turns with.
__device__ inline void add_loss(double (&sums)[2], double coef, double loss) { sums[coef < 0 ? 0 : 1] += loss; }

// Writes the sums of a block's rows, forget and retain, in one order. All threads of the block call it.
template <int rows_per_block>
__device__ void write_losses(const double (&sums)[rows_per_block][2], double* losses) {
  __syncthreads();
  if (threadIdx.x >= 32) return;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    double sum = 0;
    for (int r = threadIdx.x; r < rows_per_block; r += 32) sum += sums[r][kind];
    if constexpr (rows_per_block > 1)
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (threadIdx.x == 0) losses[static_cast<int64_t>(blockIdx.x) * 2 + kind] = sum;
  }
}

} // namespace zsu::cuda
