// The largest value of each window, optionally with relu, and its gradient; channels-last.
#pragma once

#include "reach.h"
#include "simd.h"

namespace zsu::ZSU_ISA {

typedef uint8_t VB __attribute__((vector_size(register_size / 4)));

// ---- places in a window, of all lanes or of the first n ------------------------------------------
// GCC converts vectors of bytes one by one.
ZSU_INLINE VI widen(VB v) {
#if defined(ZSU_AVX512)
  return bit_cast<VI>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(v)));
#elif defined(ZSU_F16C)
  return bit_cast<VI>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v))));
#else
  return __builtin_convertvector(v, VI);
#endif
}
ZSU_INLINE VB narrow(VI v) {
#if defined(ZSU_AVX512)
  return bit_cast<VB>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(v)));
#elif defined(ZSU_F16C)
  const auto whole = bit_cast<__m256i>(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  return bit_cast<VB>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(v, VB);
#endif
}
// In a register: a vector whose bytes are stored one by one has to wait for the stores.
ZSU_INLINE VB gathered_bytes(const uint8_t* p, int64_t n) {
  uint64_t v = 0;
  while (n > 0) v = v << 8 | p[--n];
  VB found{};
  __builtin_memcpy(&found, &v, sizeof found < sizeof v ? sizeof found : sizeof v);
  return found;
}
template <bool whole>
ZSU_INLINE VI load_places(const uint8_t* p, int64_t n) {
  VB v{};
  if constexpr (whole) __builtin_memcpy(&v, p, sizeof v);
#if defined(ZSU_AVX512)
  else v = bit_cast<VB>(_mm_maskz_loadu_epi8(static_cast<uint16_t>((1u << n) - 1u), p));
#else
  else v = gathered_bytes(p, n);
#endif
  return widen(v);
}
template <bool whole>
ZSU_INLINE void store_places(uint8_t* p, VI places, int64_t n) {
  const VB v = narrow(places);
  if constexpr (whole) __builtin_memcpy(p, &v, sizeof v);
  else copy_bytes<sizeof v>(p, &v, n);
}

// ---- forward -------------------------------------------------------------------------------------
// The part of a window that is inside the image, and where its result goes; `place` is that of its first pixel.
template <class T>
struct Window {
  const T* from;
  int64_t rows, columns;
  int32_t place;
  T* to;
  uint8_t* place_to;
};

// `size` of a whole window; 0 for any part of one. As torch, a window with a NaN gives the last one of it.
template <int size, bool whole, class T>
ZSU_INLINE void pool(const MaxPoolArgs& a, const Window<T>& w, int64_t c) {
  const int64_t rows = size ? size : w.rows, columns = size ? size : w.columns, kernel = size ? size : a.kernel;
  VF best = load_values<whole>(w.from + c, a.channels);
  VI place = VI{} + w.place;
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < columns; ++x) {
      if (y == 0 && x == 0) continue;
      const VF v = load_values<whole>(w.from + (y * a.width + x) * a.channels + c, a.channels);
      const VI take = (v > best) | (v != v);
      best = take ? v : best;
      place = take ? VI{} + (w.place + static_cast<int32_t>(y * kernel + x)) : place;
    }
  if (a.relu) {
    const VI cut = best <= 0.0f;
    best = cut ? VF{} : best;
    place = cut ? VI{} + no_place : place;
  }
  store_values<whole>(w.to + c, best, a.channels);
  store_places<whole>(w.place_to + c, place, a.channels);
}

template <int size, class T>
ZSU_INLINE void pool_channels(const MaxPoolArgs& a, const Window<T>& w) {
  for_channels(a.channels, [&](auto whole, int64_t c) ZSU_LAMBDA_INLINE { pool<size, whole()>(a, w, c); });
}

// Rows of the output, counted over all images.
template <class T>
void max_pool_kernel(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / a.out_height;
    const int64_t top = row % a.out_height * a.stride - a.padding;
    const int64_t y0 = top < 0 ? 0 : top, y1 = top + a.kernel < a.height ? top + a.kernel : a.height;
    for (int64_t column = 0; column < a.out_width; ++column) {
      const int64_t left = column * a.stride - a.padding;
      const int64_t x0 = left < 0 ? 0 : left, x1 = left + a.kernel < a.width ? left + a.kernel : a.width;
      const int64_t to = (row * a.out_width + column) * a.channels;
      const Window<T> w{
          static_cast<const T*>(a.from) + ((image * a.height + y0) * a.width + x0) * a.channels, y1 - y0, x1 - x0,
          static_cast<int32_t>((y0 - top) * a.kernel + x0 - left), static_cast<T*>(a.to) + to, a.place + to};
      const bool inside = w.rows == a.kernel && w.columns == a.kernel;
      if (inside && a.kernel == 2) pool_channels<2>(a, w);
      else if (inside && a.kernel == 3) pool_channels<3>(a, w);
      else pool_channels<0>(a, w);
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------
// The windows that a pixel is in: where the first one is in the output, how many there are, and the place of the pixel
// in the first one.
struct Windows {
  int64_t first, rows, columns;
  int32_t place;
};

// The gradient of one pixel, from `rows` times `columns` windows; 0 for any number.
template <int rows, int columns, bool whole, class T>
ZSU_INLINE void gather(const MaxPoolArgs& a, const Windows& w, T* to, int64_t c) {
  const int64_t height = rows ? rows : w.rows, breadth = columns ? columns : w.columns;
  VF sum{};
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < breadth; ++j) {
      const int64_t at = w.first + (i * a.out_width + j) * a.channels + c;
      const auto place = static_cast<int32_t>(w.place - (i * a.kernel + j) * a.stride);
      const VF grad = load_values<whole>(static_cast<const T*>(a.from) + at, a.channels);
      sum += load_places<whole>(a.place + at, a.channels) == place ? grad : VF{};
    }
  store_values<whole>(to + c, sum, a.channels);
}

template <int rows, int columns, class T>
void gather_channels(const MaxPoolArgs& a, const Windows& w, T* to) {
  for_channels(a.channels, [&](auto whole, int64_t c) ZSU_LAMBDA_INLINE { gather<rows, columns, whole()>(a, w, to, c); });
}

// Rows of the input's gradient, counted over all images.
template <class T>
void max_pool_backward_kernel(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / a.height;
    const Reach y = reach(row % a.height + a.padding, a.kernel, a.stride, a.out_height);
    int64_t left = 0, right = -1; // as `reach` finds them, without a division per pixel
    for (int64_t column = 0; column < a.width; ++column) {
      const int64_t x = column + a.padding;
      while (left * a.stride + a.kernel <= x) ++left;
      while (right + 1 < a.out_width && (right + 1) * a.stride <= x) ++right;
      const Windows w{
          ((image * a.out_height + y.first) * a.out_width + left) * a.channels, y.last - y.first + 1, right - left + 1,
          static_cast<int32_t>(y.index * a.kernel + x - left * a.stride)};
      T* to = static_cast<T*>(a.to) + (row * a.width + column) * a.channels;
      if (w.rows == 1 && w.columns == 1) gather_channels<1, 1>(a, w, to);
      else if (w.rows == 1 && w.columns == 2) gather_channels<1, 2>(a, w, to);
      else if (w.rows == 2 && w.columns == 1) gather_channels<2, 1>(a, w, to);
      else if (w.rows == 2 && w.columns == 2) gather_channels<2, 2>(a, w, to);
      else gather_channels<0, 0>(a, w, to);
    }
  }
}

} // namespace zsu::ZSU_ISA
