// KL(q || p) and its gradient, row by row: q is the teacher's softmax over the retain classes, p the
// student's over all classes. Neither is stored as a tensor: they stay in cache for the length of a row.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

// Writes the gradient of one row and returns KL(q || p). `keep` is 1 at retain classes and 0 at forgotten
// ones, `ex` and `ez` are scratch; all three hold `classes` numbers, padded to whole vectors.
template <class A, class T>
ZSU_INLINE A masked_row(const T* x, const T* z, const A* keep, T* dx, A* ex, A* ez, int64_t classes, A coef) {
  using V = typename Vec<A>::V;
  constexpr int64_t width = Vec<A>::width;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  constexpr int64_t block = 64 * width; // short sums, then the sum of those
  const V lowest = V{} - infinity;
  const auto part = [&](const T* p, int64_t at) ZSU_LAMBDA_INLINE {
    return at + width <= classes ? load(p + at) : load_part<A>(p + at, classes - at, -infinity);
  };

  V top_lanes_x = lowest, top_lanes_z = lowest;
  for (int64_t i = 0; i < classes; i += width) {
    top_lanes_x = vmax(part(x, i), top_lanes_x);
    top_lanes_z = vmax(load(keep + i) != A(0) ? part(z, i) : lowest, top_lanes_z);
  }
  const A top_x = max_lanes(top_lanes_x), top_z = max_lanes(top_lanes_z);

  V sums_x{}, sums_z{};
  for (int64_t begin = 0; begin < classes; begin += block) {
    V block_x{}, block_z{};
    for (int64_t i = begin; i < classes && i < begin + block; i += width) {
      const V e = exp_of_difference(part(x, i), top_x);
      const V f = load(keep + i) != A(0) ? exp_of_difference(part(z, i), top_z) : V{};
      store(ex + i, e);
      store(ez + i, f);
      block_x += e;
      block_z += f;
    }
    sums_x += block_x;
    sums_z += block_z;
  }
  const A sum_x = sum_lanes(sums_x), sum_z = sum_lanes(sums_z);

  const A scale_x = coef / sum_x, scale_z = coef / sum_z;
  const A log_ratio = std::log(sum_x) - std::log(sum_z);
  V loss{};
  for (int64_t begin = 0; begin < classes; begin += block) {
    V block_loss{};
    for (int64_t i = begin; i < classes && i < begin + block; i += width) {
      const V f = load(ez + i);
      const V log_q_over_p = (part(z, i) - top_z) - (part(x, i) - top_x) + log_ratio;
      block_loss += f == A(0) ? V{} : f * log_q_over_p;
      const V gradient = load(ex + i) * scale_x - f * scale_z;
      if (i + width <= classes) store(dx + i, gradient);
      else store_part(dx + i, gradient, classes - i);
    }
    loss += block_loss;
  }
  return sum_lanes(loss) / sum_z;
}

template <class A, class T>
void masked_cross_entropy_kernel(const MaskedCrossEntropyArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t width = Vec<A>::width;
  const int64_t padded = (a.classes + width - 1) / width * width;
  const Scratch<A> scratch(3 * padded);
  A* ex = scratch.data;
  A* ez = ex + padded;
  A* keep = ez + padded;
  for (int64_t c = 0; c < padded; ++c) keep[c] = c < a.classes && !a.forget[c] ? A(1) : A(0);
  for (int64_t row = begin; row < end; ++row) {
    T* dlogits = static_cast<T*>(a.dlogits) + row * a.classes;
    const A coef = static_cast<const A*>(a.coef)[row];
    if (coef == 0) {
      __builtin_memset(dlogits, 0, static_cast<size_t>(a.classes) * sizeof(T));
      a.row_loss[row] = 0;
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + row * a.logits_stride;
    const T* z = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
    a.row_loss[row] = static_cast<double>(coef) *
        static_cast<double>(masked_row<A>(x, z, keep, dlogits, ex, ez, a.classes, coef));
  }
}

} // namespace zsu::ZSU_ISA
