// KL(q || p) and its gradient, row by row: q is the teacher's softmax over the retain classes, p the
// student's over all classes. Neither is stored as a tensor: they stay in cache for the length of a row.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

// One row, in the type A in which it is computed. `retain` is 1 at retain classes and 0 at forgotten ones,
// `shift` is added to the student's logits, `ex` and `ez` are scratch; all four hold `classes` numbers, padded
// to whole vectors.
template <class A, class T, class Z>
struct MaskedRow {
  const T* x;
  const Z* z;
  const A *retain, *shift;
  T* dx;
  A *ex, *ez;
  int64_t classes;
  A coef, keep;
  bool forget_only;
};

// Writes the gradient of a row and returns coef * KL(q || p) + keep * (squared change of retained logits).
template <class A, class T, class Z>
ZSU_INLINE double masked_row(const MaskedRow<A, T, Z> r) {
  using V = typename Vec<A>::V;
  constexpr int64_t width = Vec<A>::width;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  constexpr int64_t block = 64 * width; // short sums, then the sum of those
  // locals: through dx the compiler would take any member to have changed
  const int64_t classes = r.classes;
  const A coef = r.coef, keep = r.keep;
  const A *const retain = r.retain, *const shift = r.shift;
  A *const ex = r.ex, *const ez = r.ez;
  const bool forget_only = r.forget_only;
  const V lowest = V{} - infinity;
  const auto part = [&](const auto* p, int64_t at) ZSU_LAMBDA_INLINE {
    return at + width <= classes ? static_cast<V>(load(p + at)) : load_part<A>(p + at, classes - at, -infinity);
  };
  const auto is_retained = [&](int64_t at) ZSU_LAMBDA_INLINE { return load(retain + at) != A(0); };

  V top_lanes_x = lowest, top_lanes_z = lowest;
  for (int64_t i = 0; i < classes; i += width) {
    top_lanes_x = vmax(part(r.x, i) + load(shift + i), top_lanes_x);
    top_lanes_z = vmax(is_retained(i) ? part(r.z, i) : lowest, top_lanes_z);
  }
  const A top_x = max_lanes(top_lanes_x), top_z = max_lanes(top_lanes_z);

  V sums_x{}, sums_z{};
  for (int64_t begin = 0; begin < classes; begin += block) {
    V block_x{}, block_z{};
    for (int64_t i = begin; i < classes && i < begin + block; i += width) {
      const V e = exp_of_difference(part(r.x, i) + load(shift + i), top_x);
      const V f = is_retained(i) ? exp_of_difference(part(r.z, i), top_z) : V{};
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
  V loss{}, change{};
  for (int64_t begin = 0; begin < classes; begin += block) {
    V block_loss{}, block_change{};
    for (int64_t i = begin; i < classes && i < begin + block; i += width) {
      // the shift of a forgotten class does not matter: f is 0 there
      const V f = load(ez + i), x = part(r.x, i), z = part(r.z, i);
      const V log_q_over_p = (z - top_z) - (x - top_x) + log_ratio;
      block_loss += f == A(0) ? V{} : f * log_q_over_p;
      V gradient = load(ex + i) * scale_x - f * scale_z;
      if (keep != 0) {
        const V d = is_retained(i) ? x - z : V{};
        block_change += d * d;
        gradient += 2 * keep * d;
      }
      if (forget_only) gradient = is_retained(i) ? V{} : gradient;
      if (i + width <= classes) store(r.dx + i, gradient);
      else store_part(r.dx + i, gradient, classes - i);
    }
    loss += block_loss;
    change += block_change;
  }
  return static_cast<double>(coef) * static_cast<double>(sum_lanes(loss) / sum_z) +
      static_cast<double>(keep) * static_cast<double>(sum_lanes(change));
}

template <class A, class T, class Z>
void masked_cross_entropy_kernel(const MaskedCrossEntropyArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t width = Vec<A>::width;
  const int64_t padded = (a.classes + width - 1) / width * width;
  const Scratch<A> scratch(4 * padded);
  A* ex = scratch.data;
  A* ez = ex + padded;
  A* retain = ez + padded;
  A* shift = retain + padded;
  for (int64_t c = 0; c < padded; ++c) {
    retain[c] = c < a.classes && !a.forget[c] ? A(1) : A(0);
    shift[c] = c < a.classes && a.forget[c] ? static_cast<A>(a.shift) : A(0);
  }
  for (int64_t row = begin; row < end; ++row) {
    T* dlogits = static_cast<T*>(a.dlogits) + row * a.classes;
    const A coef = static_cast<const A*>(a.coef)[row];
    if (coef == 0) {
      __builtin_memset(dlogits, 0, static_cast<size_t>(a.classes) * sizeof(T));
      a.row_loss[row] = 0;
      continue;
    }
    const int64_t of_teacher = a.index ? a.index[row] : row;
    const MaskedRow<A, T, Z> r{
        static_cast<const T*>(a.logits) + row * a.logits_stride,
        static_cast<const Z*>(a.teacher) + of_teacher * a.teacher_stride, retain, shift, dlogits, ex, ez, a.classes,
        coef, a.keep ? static_cast<const A*>(a.keep)[row] : A(0), a.forget_only};
    a.row_loss[row] = masked_row(r);
  }
}

} // namespace zsu::ZSU_ISA
