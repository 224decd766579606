// The largest value of each window, optionally with relu, and its gradient; channels-last.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

typedef uint8_t VB __attribute__((vector_size(16)));

ZSU_INLINE VI load_places(const uint8_t* p, int64_t n) {
  VB places{};
  if (n >= 16) __builtin_memcpy(&places, p, sizeof places);
#if defined(ZSU_AVX512)
  else places = bit_cast<VB>(_mm_maskz_loadu_epi8(static_cast<uint16_t>((1u << n) - 1u), p));
#else
  else for (int64_t i = 0; i < n; ++i) places[i] = p[i];
#endif
  return __builtin_convertvector(places, VI);
}
ZSU_INLINE void store_places(uint8_t* p, VI v, int64_t n) {
  const VB places = __builtin_convertvector(v, VB);
  if (n >= 16) __builtin_memcpy(p, &places, sizeof places);
#if defined(ZSU_AVX512)
  else _mm_mask_storeu_epi8(p, static_cast<uint16_t>((1u << n) - 1u), bit_cast<__m128i>(places));
#else
  else for (int64_t i = 0; i < n; ++i) p[i] = places[i];
#endif
}
template <class T>
ZSU_INLINE VF load_up_to(const T* p, int64_t n) { return n >= 16 ? load(p) : load_part(p, n, 0.0f); }
template <class T>
ZSU_INLINE void store_up_to(T* p, VF v, int64_t n) {
  if (n >= 16) store(p, v);
  else store_part(p, v, n);
}

// Rows of the output, counted over all images. As torch, a window with a NaN gives the last one of it.
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
      for (int64_t c = 0; c < a.channels; c += 16) {
        const int64_t n = a.channels - c;
        VF best{};
        VI place{};
        for (int64_t y = y0; y < y1; ++y) {
          const T* from = static_cast<const T*>(a.from) + ((image * a.height + y) * a.width + x0) * a.channels + c;
          int32_t at = static_cast<int32_t>((y - top) * a.kernel + x0 - left);
          for (int64_t x = x0; x < x1; ++x, ++at, from += a.channels) {
            const VF v = load_up_to(from, n);
            const VI take = y == y0 && x == x0 ? VI{} - 1 : (v > best) | (v != v);
            best = take ? v : best;
            place = take ? VI{} + at : place;
          }
        }
        if (a.relu) {
          const VI cut = best <= 0.0f;
          best = cut ? VF{} : best;
          place = cut ? VI{} + no_place : place;
        }
        store_up_to(static_cast<T*>(a.to) + to + c, best, n);
        store_places(a.place + to + c, place, n);
      }
    }
  }
}

// Adds to the gradients of one row of pixels, y below the top of the padded image, those of a row of windows; with
// `alone`, windows neither overlap nor leave pixels out between them, and nothing is read.
template <bool alone, class T, class S>
ZSU_INLINE void spread(const MaxPoolArgs& a, int64_t image, int64_t y, int64_t window, S* sum) {
  const auto first = static_cast<int32_t>((y - window * a.stride) * a.kernel);
  const int64_t row = (image * a.out_height + window) * a.out_width;
  for (int64_t j = 0; j < a.out_width; ++j) {
    const int64_t left = j * a.stride - a.padding;
    const int64_t x0 = left < 0 ? 0 : left, x1 = left + a.kernel < a.width ? left + a.kernel : a.width;
    for (int64_t c = 0; c < a.channels; c += 16) {
      const int64_t n = a.channels - c, from = (row + j) * a.channels + c;
      const VF grad = load_up_to(static_cast<const T*>(a.from) + from, n);
      const VI place = load_places(a.place + from, n);
      S* to = sum + x0 * a.channels + c;
      for (int64_t x = x0; x < x1; ++x, to += a.channels) {
        VF own = place == first + static_cast<int32_t>(x - left) ? grad : VF{};
        if constexpr (!alone) own += load_up_to(to, n);
        store_up_to(to, own, n);
      }
    }
  }
  if constexpr (alone) { // no window has the pixels from here on
    const int64_t end = a.out_width * a.stride - a.padding;
    if (end < a.width) __builtin_memset(sum + end * a.channels, 0, sizeof(S) * (a.width - end) * a.channels);
  }
}

// Rows of the input's gradient, counted over all images.
template <class T>
void max_pool_backward_kernel(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  const int64_t size = a.width * a.channels;
  const Scratch<float> sum(a.kernel == a.stride ? 0 : size);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / a.height, y = row % a.height + a.padding;
    const int64_t above = y < a.kernel ? 0 : (y - a.kernel) / a.stride + 1;
    const int64_t below = y / a.stride < a.out_height - 1 ? y / a.stride : a.out_height - 1;
    T* to = static_cast<T*>(a.to) + row * size;
    if (above > below) {
      __builtin_memset(to, 0, sizeof(T) * size);
    } else if (a.kernel == a.stride) {
      spread<true, T>(a, image, y, above, to);
    } else {
      __builtin_memset(sum.data, 0, sizeof(float) * size);
      for (int64_t i = above; i <= below; ++i) spread<false, T>(a, image, y, i, sum.data);
      for (int64_t i = 0; i < size; i += 16) store_up_to(to + i, load_up_to(sum.data + i, size - i), size - i);
    }
  }
}

} // namespace zsu::ZSU_ISA
