// Vectors of 64 bytes in GCC's own vector syntax: one zmm, two ymm or four xmm registers, whatever
// the file that includes this is compiled for. Sums over lanes have one fixed order.
#pragma once

#include "../math.h"

#define ZSU_LAMBDA_INLINE __attribute__((always_inline))

namespace zsu::ZSU_ISA {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class A> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int64_t width = 16;
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
};
template <> struct Lanes<double> {
  static constexpr int64_t width = 8;
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
};
using VF = Lanes<float>::V;
using VD = Lanes<double>::V;
using VI = Lanes<float>::I;
typedef uint16_t VH __attribute__((vector_size(32)));

template <class To, class From>
ZSU_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- one number of any storage type --------------------------------------------------------------
ZSU_INLINE float widen(float v) { return v; }
ZSU_INLINE double widen(double v) { return v; }
ZSU_INLINE float widen(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
ZSU_INLINE float widen(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  if ((v.bits & 0x7c00u) == 0x7c00u) return bit_cast<float>(sign | rest | 0x7f800000u);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f)); // denormals too
}
ZSU_INLINE void narrow(float v, float& to) { to = v; }
ZSU_INLINE void narrow(double v, double& to) { to = v; }
ZSU_INLINE void narrow(float v, BFloat16& to) {
  const uint32_t b = bit_cast<uint32_t>(v);
  to.bits = static_cast<uint16_t>(v != v ? 0x7fc0u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
ZSU_INLINE void narrow(float v, Float16& to) {
  const uint32_t b = bit_cast<uint32_t>(v), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  uint32_t r;
  if (magnitude > 0x7f800000u) r = 0x7e00u;
  else if (magnitude >= 0x477ff000u) r = 0x7c00u; // rounds to infinity
  else if (magnitude < 0x38800000u)               // denormal: let the adder round
    r = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  else r = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  to.bits = static_cast<uint16_t>(sign | r);
}

// ---- a vector of any storage type ----------------------------------------------------------------
ZSU_INLINE VF load(const float* p) { VF v; __builtin_memcpy(&v, p, sizeof v); return v; }
ZSU_INLINE VD load(const double* p) { VD v; __builtin_memcpy(&v, p, sizeof v); return v; }
ZSU_INLINE VF load(const BFloat16* p) {
  VH h;
  __builtin_memcpy(&h, p, sizeof h);
  return bit_cast<VF>(__builtin_convertvector(h, VI) << 16);
}
ZSU_INLINE VF load(const Float16* p) {
  VF v;
#if defined(ZSU_AVX512)
  v = bit_cast<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(ZSU_F16C)
  for (int i = 0; i < 2; ++i) {
    const __m256 half = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    __builtin_memcpy(reinterpret_cast<char*>(&v) + 32 * i, &half, sizeof half);
  }
#else
  for (int i = 0; i < 16; ++i) v[i] = widen(p[i]);
#endif
  return v;
}
ZSU_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }
ZSU_INLINE void store(double* p, VD v) { __builtin_memcpy(p, &v, sizeof v); }
ZSU_INLINE void store(BFloat16* p, VF v) {
  typedef uint32_t U __attribute__((vector_size(64)));
  const U b = bit_cast<U>(v);
  const U rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const VH h = __builtin_convertvector(v == v ? rounded : rounded * 0u + 0x7fc0u, VH);
  __builtin_memcpy(p, &h, sizeof h);
}
ZSU_INLINE void store(Float16* p, VF v) {
#if defined(ZSU_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), 0));
#elif defined(ZSU_F16C)
  for (int i = 0; i < 2; ++i) {
    __m256 half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + 32 * i, sizeof half);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, _mm256_cvtps_ph(half, 0));
  }
#else
  for (int i = 0; i < 16; ++i) narrow(v[i], p[i]);
#endif
}

// ---- the first n lanes, n < width: the end of a row ----------------------------------------------
template <class A, class T>
ZSU_INLINE typename Lanes<A>::V load_part(const T* p, int64_t n, A fill) {
#if defined(ZSU_AVX512)
  if constexpr (__is_same(T, float))
    return bit_cast<VF>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (1u << n) - 1u, p));
#endif
  typename Lanes<A>::V v = fill - typename Lanes<A>::V{};
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T, class V>
ZSU_INLINE void store_part(T* p, V v, int64_t n) {
#if defined(ZSU_AVX512)
  if constexpr (__is_same(T, float)) {
    _mm512_mask_storeu_ps(p, (1u << n) - 1u, bit_cast<__m512>(v));
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) narrow(v[i], p[i]);
}

// Lane `at` alone, the others 0; and the other way round. (Indexing v[at] would go through memory.)
ZSU_INLINE VI lane_index(VF) { return VI{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
ZSU_INLINE Lanes<double>::I lane_index(VD) { return Lanes<double>::I{0, 1, 2, 3, 4, 5, 6, 7}; }
template <class V>
ZSU_INLINE V only_lane(V v, int at) { return lane_index(v) == at ? v : V{}; }
template <class V>
ZSU_INLINE V without_lane(V v, int at) { return lane_index(v) == at ? V{} : v; }

// ---- over lanes ----------------------------------------------------------------------------------
template <class V>
ZSU_INLINE V larger(V a, V b) { return a > b ? a : b; } // b where a is NaN

// Lane i meets lane i ^ by. The indices are literals, or they would be rebuilt for every row.
template <int by>
ZSU_INLINE VF swap_lanes(VF v) {
  return __builtin_shuffle(v, VI{0 ^ by, 1 ^ by, 2 ^ by, 3 ^ by, 4 ^ by, 5 ^ by, 6 ^ by, 7 ^ by, 8 ^ by, 9 ^ by,
                                 10 ^ by, 11 ^ by, 12 ^ by, 13 ^ by, 14 ^ by, 15 ^ by});
}
template <int by>
ZSU_INLINE VD swap_lanes(VD v) {
  return __builtin_shuffle(
      v, Lanes<double>::I{0 ^ by, 1 ^ by, 2 ^ by, 3 ^ by, 4 ^ by, 5 ^ by, 6 ^ by, 7 ^ by});
}
template <int by, class V, class F>
ZSU_INLINE auto fold_lanes(V v, F f) {
  v = f(v, swap_lanes<by>(v));
  if constexpr (by > 1) return fold_lanes<by / 2>(v, f);
  else return v[0];
}
template <class V>
ZSU_INLINE auto sum_lanes(V v) {
  return fold_lanes<sizeof v / sizeof v[0] / 2>(v, [](V a, V b) ZSU_LAMBDA_INLINE { return a + b; });
}
template <class V>
ZSU_INLINE auto max_lanes(V v) {
  return fold_lanes<sizeof v / sizeof v[0] / 2>(v, [](V a, V b) ZSU_LAMBDA_INLINE { return larger(a, b); });
}

// ---- functions -----------------------------------------------------------------------------------
// exp(x + low) for x <= 80 and |low| tiny, 1e-7 relative; 0 below -86 (the result nears denormals).
ZSU_INLINE VF exponential(VF x, VF low) {
  const float to_integer = 12582912.0f; // 1.5 * 2^23: adding it leaves round(.) in the low bits
  const VF shifted = x * 1.44269504088896341f + to_integer;
  const VF n = shifted - to_integer;
  VF r = x - n * 0.693359375f; // exact: 0.693359375 has 9 bits
  r = r - n * -2.12194440e-4f + low;
  VF p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VF power = bit_cast<VF>((bit_cast<VI>(shifted) << 23) + 0x3f800000);
  return x < -86.0f ? VF{} : p * power;
}
ZSU_INLINE VD exponential(VD x, VD) {
  VD e;
  for (int i = 0; i < 8; ++i) e[i] = __builtin_exp(x[i]);
  return e;
}

// exp(a - b): the part of a - b that does not fit one number (Knuth's two-sum) is not lost, or
// logits 40 apart would already cost 2e-6 of relative accuracy.
ZSU_INLINE VF exp_of_difference(VF a, float b) {
  const VF d = a - b;
  const VF z = d - a;
  const VF lost = (a - (d - z)) - (b + z);
  return exponential(d, lost); // a = -inf: lost is NaN, but d < -86 decides
}
ZSU_INLINE VD exp_of_difference(VD a, double b) { return exponential(a - b, VD{}); }

// a / (sqrt(b) + eps). Approximations with a Newton step were tried: no faster, the step waits for memory.
ZSU_INLINE VF ratio_to_root(VF a, VF b, float eps) {
#if defined(ZSU_AVX512)
  const VF root = bit_cast<VF>(_mm512_sqrt_ps(bit_cast<__m512>(b)));
#else
  VF root;
  for (int i = 0; i < 16; ++i) root[i] = __builtin_sqrtf(b[i]);
#endif
  return a / (root + eps);
}

} // namespace zsu::ZSU_ISA
