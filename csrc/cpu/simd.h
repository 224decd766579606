// Vectors of one register, zmm, ymm or xmm by the instruction set of the including file, in the vector syntax of GCC
// and clang. GCC keeps wider ones in memory, and compares them lane by lane. Sums over lanes have one fixed order per
// instruction set.
#pragma once

#include "../math.h"

#define ZSU_LAMBDA_INLINE __attribute__((always_inline))
// For loops of at most 12 turns.
#if defined(__clang__)
#define ZSU_UNROLL _Pragma("unroll")
#else
#define ZSU_UNROLL _Pragma("GCC unroll 12")
#endif

namespace zsu::ZSU_ISA {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#if defined(ZSU_AVX512)
constexpr int register_size = 64;
#elif defined(ZSU_F16C)
constexpr int register_size = 32;
#else
constexpr int register_size = 16;
#endif

template <class A> struct Vec;
template <> struct Vec<float> {
  static constexpr int width = register_size / 4;
  typedef float V __attribute__((vector_size(register_size)));
  typedef int32_t I __attribute__((vector_size(register_size)));
};
template <> struct Vec<double> {
  static constexpr int width = register_size / 8;
  typedef double V __attribute__((vector_size(register_size)));
  typedef int64_t I __attribute__((vector_size(register_size)));
};
using VF = Vec<float>::V;
using VD = Vec<double>::V;
using VI = Vec<float>::I;
constexpr int64_t lanes = Vec<float>::width;
typedef uint16_t VH __attribute__((vector_size(register_size / 2)));

template <class To, class From>
ZSU_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- one number of any storage type; double stays double -----------------------------------------
ZSU_INLINE float to_float(float v) { return v; }
ZSU_INLINE double to_float(double v) { return v; }
ZSU_INLINE float to_float(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
ZSU_INLINE float to_float(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  if ((v.bits & 0x7c00u) == 0x7c00u) return bit_cast<float>(sign | rest | 0x7f800000u);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f)); // denormals too
}
ZSU_INLINE void from_float(float v, float& to) { to = v; }
ZSU_INLINE void from_float(double v, double& to) { to = v; }
ZSU_INLINE void from_float(float v, BFloat16& to) {
  const uint32_t b = bit_cast<uint32_t>(v);
  to.bits = static_cast<uint16_t>(v != v ? 0x7fc0u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
ZSU_INLINE void from_float(float v, Float16& to) {
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
ZSU_INLINE VF bfloat16_to_float(VH h) { return bit_cast<VF>(__builtin_convertvector(h, VI) << 16); }
ZSU_INLINE VF load(const BFloat16* p) {
  VH h;
  __builtin_memcpy(&h, p, sizeof h);
  return bfloat16_to_float(h);
}
ZSU_INLINE VF load(const Float16* p) {
#if defined(ZSU_AVX512)
  return bit_cast<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(ZSU_F16C)
  return bit_cast<VF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(ZSU_NEON)
  return bit_cast<VF>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))));
#else
  VF v;
  for (int i = 0; i < lanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
ZSU_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }
ZSU_INLINE void store(double* p, VD v) { __builtin_memcpy(p, &v, sizeof v); }
ZSU_INLINE VH float_to_bfloat16(VF v) {
  typedef uint32_t U __attribute__((vector_size(register_size)));
  const U b = bit_cast<U>(v);
  const U rounded = b + 0x7fffu + ((b >> 16) & 1u);
  return __builtin_convertvector((v == v ? rounded : b | 0x400000u) >> 16, VH); // a NaN stays one
}
ZSU_INLINE void store(BFloat16* p, VF v) {
  const VH h = float_to_bfloat16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
ZSU_INLINE void store(Float16* p, VF v) {
#if defined(ZSU_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), 0));
#elif defined(ZSU_F16C)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#elif defined(ZSU_NEON)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  for (int i = 0; i < lanes; ++i) from_float(v[i], p[i]);
#endif
}

// ---- the first n lanes, n < width: the end of a row ----------------------------------------------
// n < most bytes. memcpy would be a call.
template <int64_t most>
ZSU_INLINE void copy_bytes(void* to, const void* from, int64_t n) {
  if constexpr (most > 1) {
    constexpr int64_t half = most / 2;
    const bool copied = n >= half;
    if (copied) __builtin_memcpy(to, from, half);
    const int64_t done = copied ? half : 0;
    copy_bytes<half>(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, n - done);
  }
}
template <class A, class T>
ZSU_INLINE typename Vec<A>::V load_part(const T* p, int64_t n, A fill) {
#if defined(ZSU_AVX512) // does not touch the memory of the other lanes
  const auto first = static_cast<uint16_t>((1u << n) - 1u);
  if constexpr (__is_same(T, float)) {
    return bit_cast<VF>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first, p));
  } else if constexpr (__is_same(T, double)) {
    return bit_cast<VD>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<uint8_t>(first), p));
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(first, p);
    VF v;
    if constexpr (__is_same(T, BFloat16)) v = bfloat16_to_float(bit_cast<VH>(half));
    else v = bit_cast<VF>(_mm512_cvtph_ps(half));
    return bit_cast<VF>(_mm512_mask_mov_ps(_mm512_set1_ps(fill), first, bit_cast<__m512>(v)));
  }
#else
#if defined(ZSU_F16C)
  if constexpr (__is_same(T, float)) {
    const VI first = VI{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n);
    const VF v = bit_cast<VF>(_mm256_maskload_ps(p, bit_cast<__m256i>(first)));
    return first ? v : VF{} + fill;
  }
#endif
  constexpr int64_t width = Vec<A>::width;
  T part[width];
  for (int64_t i = 0; i < width; ++i) from_float(fill, part[i]);
  copy_bytes<sizeof part>(part, p, n * static_cast<int64_t>(sizeof(T)));
  return load(part);
#endif
}
template <class T, class V>
ZSU_INLINE void store_part(T* p, V v, int64_t n) {
#if defined(ZSU_AVX512)
  const auto first = static_cast<uint16_t>((1u << n) - 1u);
  if constexpr (__is_same(T, float)) _mm512_mask_storeu_ps(p, first, bit_cast<__m512>(v));
  else if constexpr (__is_same(T, double)) _mm512_mask_storeu_pd(p, static_cast<uint8_t>(first), bit_cast<__m512d>(v));
  else if constexpr (__is_same(T, BFloat16)) _mm256_mask_storeu_epi16(p, first, bit_cast<__m256i>(float_to_bfloat16(v)));
  else _mm256_mask_storeu_epi16(p, first, _mm512_cvtps_ph(bit_cast<__m512>(v), 0));
#else
  T part[sizeof v / sizeof v[0]];
  store(part, v);
  copy_bytes<sizeof part>(p, part, n * static_cast<int64_t>(sizeof(T)));
#endif
}
// All lanes if `whole`, or the first n.
template <bool whole, class T>
ZSU_INLINE VF load_values(const T* p, int64_t n) {
  if constexpr (whole) return load(p);
  else return load_part(p, n, 0.0f);
}
template <bool whole, class T>
ZSU_INLINE void store_values(T* p, VF v, int64_t n) {
  if constexpr (whole) store(p, v);
  else store_part(p, v, n);
}

// f(whole, c) of all channels: of whole vectors from c on, the last of which may overlap the one before, or of all
// channels if they are less than a vector.
template <class F>
ZSU_INLINE void for_channels(int64_t channels, F f) {
  if (channels < lanes) return f(std::false_type{}, 0);
  for (int64_t c = 0; c + lanes <= channels; c += lanes) f(std::true_type{}, c);
  if (channels % lanes) f(std::true_type{}, channels - lanes);
}

// v with lane `at` set to 0.
template <class V>
ZSU_INLINE V without_lane(V v, int at) {
  v[at] = 0;
  return v;
}

// ---- over lanes ----------------------------------------------------------------------------------
template <class V>
ZSU_INLINE V vmax(V a, V b) { return a > b ? a : b; } // b if a is NaN

// Lane i gets lane i ^ by.
template <int by, class V, int... i>
ZSU_INLINE V swap_lanes(V v, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (i ^ by)...);
#else
  return __builtin_shuffle(v, decltype(v < v){(i ^ by)...});
#endif
}
template <int by, class V, class F>
ZSU_INLINE auto fold_lanes(V v, F f) {
  v = f(v, swap_lanes<by>(v, std::make_integer_sequence<int, sizeof v / sizeof v[0]>()));
  if constexpr (by > 1) return fold_lanes<by / 2>(v, f);
  else return v[0];
}
template <class V>
ZSU_INLINE auto sum_lanes(V v) {
  return fold_lanes<sizeof v / sizeof v[0] / 2>(v, [](V a, V b) ZSU_LAMBDA_INLINE { return a + b; });
}
template <class V>
ZSU_INLINE auto max_lanes(V v) {
  return fold_lanes<sizeof v / sizeof v[0] / 2>(v, [](V a, V b) ZSU_LAMBDA_INLINE { return vmax(a, b); });
}

// ---- functions -----------------------------------------------------------------------------------
// exp(x + low) for x <= 80 and tiny |low|, to 1e-7 relative; 0 below -86, where the result nears
// denormals. Above 88 the result is meaningless and the caller must discard it.
struct Nothing {}; // as `low`: costs no operation
template <class Low>
ZSU_INLINE VF exponential(VF x, Low low) {
  // 1.5 * 2^23 + 127: adding it leaves round(.) + 127, the exponent of a float, in the low bits
  const float to_exponent = 12583039.0f;
  const VF shifted = x * 1.44269504088896341f + to_exponent;
  const VF n = shifted - to_exponent;
  VF r;
#if defined(ZSU_FMA)
  if constexpr (__is_same(Low, Nothing)) r = x - n * 0.69314718056f; // rounded once; error n * 2e-9
  else
#endif
  {
    r = x - n * 0.693359375f; // exact: 0.693359375 has 9 bits
    r = r - n * -2.12194440e-4f;
    if constexpr (!__is_same(Low, Nothing)) r += low;
  }
  VF p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VF power = bit_cast<VF>(bit_cast<VI>(shifted) << 23);
  return x < -86.0f ? VF{} : p * power;
}
// The same in double, to 3e-16 relative, 0 below -708: a Taylor series whose next term is 4e-18.
template <class Low>
ZSU_INLINE VD exponential(VD x, Low) {
  const double to_exponent = 6755399441056767.0; // 1.5 * 2^52 + 1023
  const VD shifted = x * 1.44269504088896341 + to_exponent;
  const VD n = shifted - to_exponent;
  VD r = x - n * 0x1.62e42fee00000p-1; // exact for |n| < 2^20
  r = r - n * 0x1.a39ef35793c76p-33;
  VD p = r * (1 / 6227020800.0) + 1 / 479001600.0;
  p = p * r + 1 / 39916800.0;
  p = p * r + 1 / 3628800.0;
  p = p * r + 1 / 362880.0;
  p = p * r + 1 / 40320.0;
  p = p * r + 1 / 5040.0;
  p = p * r + 1 / 720.0;
  p = p * r + 1 / 120.0;
  p = p * r + 1 / 24.0;
  p = p * r + 1 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const VD power = bit_cast<VD>(bit_cast<Vec<double>::I>(shifted) << 52);
  return x < -708.0 ? VD{} : p * power;
}

// log(x) for normal x > 0, to 1e-7 relative also near 1 (Cephes' logf). Keeps NaN and infinity.
ZSU_INLINE VF logarithm(VF x) {
  const VI exponent = (bit_cast<VI>(x) - 0x3f3504f3) >> 23; // of x / sqrt(1/2)
  const VF f = bit_cast<VF>(bit_cast<VI>(x) - (exponent << 23)) - 1.0f;
  const VF n = __builtin_convertvector(exponent, VF);
  VF p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VF square = f * f;
  const VF rest = p * f * square - n * 2.12194440e-4f - 0.5f * square;
  return x - x == 0.0f ? (f + rest) + n * 0.693359375f : x;
}
ZSU_INLINE VD logarithm(VD x) {
  for (int i = 0; i < Vec<double>::width; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// exp(a - b), with the part of a - b that rounding drops (Knuth's two-sum): it would cost 2e-6 of
// relative accuracy where logits differ by 40.
ZSU_INLINE VF exp_of_difference(VF a, float b) {
  const VF d = a - b;
  const VF z = d - a;
  const VF lost = (a - (d - z)) - (b + z);
  return exponential(d, lost); // a = -inf: lost is NaN, but d < -86 gives 0
}
ZSU_INLINE VD exp_of_difference(VD a, double b) { return exponential(a - b, Nothing{}); }

// a / (sqrt(b) + eps). Approximations with a Newton step are no faster: the kernel waits for memory.
ZSU_INLINE VF ratio_to_root(VF a, VF b, float eps) {
#if defined(ZSU_AVX512)
  const VF root = bit_cast<VF>(_mm512_sqrt_ps(bit_cast<__m512>(b)));
#elif defined(ZSU_NEON)
  const VF root = vsqrtq_f32(b);
#else
  VF root;
  for (int i = 0; i < lanes; ++i) root[i] = __builtin_sqrtf(b[i]);
#endif
  return a / (root + eps);
}

} // namespace zsu::ZSU_ISA
