// Loss and gradient of one row of signed cross-entropy in one pass over memory: the row is read
// three times, but from the second time on it lies in cache.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

// What the loss of a row follows from. Its logarithm is taken later, for many rows in a loop: a call
// to libm between the vector code of two rows would reload every constant.
template <class A>
struct RowSums {
  A shifted, rest, denominator;
};

// `e` holds `classes` numbers; it may be dlogits itself, and dlogits may be logits.
template <class A, class T>
ZSU_INLINE RowSums<A> signed_row(const T* logits, T* dlogits, const T* next_logits, T* next_dlogits, A* e, int64_t classes,
                                 int64_t target, A coef) {
  using V = typename Lanes<A>::V;
  constexpr int64_t width = Lanes<A>::width;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const int64_t whole = classes / width * width, rest_of_row = classes - whole;

  V tops[2] = {V{} - infinity, V{} - infinity};
  int64_t i = 0;
  for (; i + width < whole; i += 2 * width) {
    tops[0] = larger(load(logits + i), tops[0]);
    tops[1] = larger(load(logits + i + width), tops[1]);
  }
  if (i < whole) tops[0] = larger(load(logits + i), tops[0]);
  if (rest_of_row) tops[1] = larger(load_part<A>(logits + whole, rest_of_row, -infinity), tops[1]);
  const A top = max_lanes(larger(tops[0], tops[1]));
  const A target_logit = widen(logits[target]); // before an in-place call overwrites it
  const A shifted = target_logit - top;

  // 1 - p is the sum of the *other* probabilities: 1 minus p would lose every digit as p -> 1.
  V others{};
  A at_target = 0;
  const auto exponentials = [&](auto exp) ZSU_LAMBDA_INLINE {
    const auto exp_block = [&](int64_t at) ZSU_LAMBDA_INLINE {
      __builtin_prefetch(next_logits + at);
      __builtin_prefetch(next_dlogits + at, 1);
      const V v = exp(load(logits + at));
      store(e + at, v);
      return v;
    };
    const auto exp_blocks = [&](int64_t at, int64_t end) ZSU_LAMBDA_INLINE {
      while (at < end) { // short sums, then a sum of those: 32,000 terms in one lose a digit
        const int64_t stop = at + 64 * width < end ? at + 64 * width : end;
        V sum{};
        for (; at < stop; at += width) sum += exp_block(at);
        others += sum;
      }
    };
    const int64_t target_block = target / width * width;
    if (target_block < whole) {
      exp_blocks(0, target_block);
      const V v = exp_block(target_block);
      at_target = sum_lanes(only_lane(v, static_cast<int>(target - target_block)));
      others += without_lane(v, static_cast<int>(target - target_block));
      exp_blocks(target_block + width, whole);
    } else {
      exp_blocks(0, whole);
    }
    if (rest_of_row) {
      const V v = exp(load_part<A>(logits + whole, rest_of_row, -infinity));
      store_part(e + whole, v, rest_of_row);
      if (target_block == whole) at_target = sum_lanes(only_lane(v, static_cast<int>(target - whole)));
      others += without_lane(v, target_block == whole ? static_cast<int>(target - whole) : -1);
    }
  };
  // exp(x - top) needs the part of x - top that rounding drops; exp(x) does not, and where it is far
  // from overflow it serves as well: softmax does not change, and `scale` puts the sums right.
  A scale = 1;
  if (__is_same(A, float) && classes >= 128 && top >= -16 && top <= 32) {
    exponentials([](V x) ZSU_LAMBDA_INLINE { return exponential(x, V{}); });
    scale = 1 / exponential(V{} + top, V{})[0];
  } else {
    exponentials([top](V x) ZSU_LAMBDA_INLINE { return exp_of_difference(x, top); });
  }
  const A rest = sum_lanes(others);
  const A denominator = rest + at_target;

  const A factor = coef / denominator;
  for (i = 0; i < whole; i += width) store(dlogits + i, load(e + i) * factor);
  if (rest_of_row) store_part(dlogits + whole, load_part<A>(e + whole, rest_of_row, A(0)) * factor, rest_of_row);
  narrow(-factor * rest, dlogits[target]);
  return {shifted, rest * scale, denominator * scale};
}

template <class A, class T>
void signed_cross_entropy_rows(const SignedRows& a, int64_t begin, int64_t end) {
  constexpr bool needs_scratch = !__is_same(A, T);
  const Scratch<A> scratch(needs_scratch ? a.classes : 0);
  constexpr int64_t chunk = 64;
  RowSums<A> sums[chunk];
  const A* coef = static_cast<const A*>(a.coef);
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t last = first + chunk < end ? first + chunk : end;
    for (int64_t row = first; row < last; ++row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
      T* dlogits = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
      if (coef[row] == 0) {
        for (int64_t i = 0; i < a.classes; ++i) narrow(A(0), dlogits[i]);
        continue;
      }
      A* e = scratch.data;
      if constexpr (!needs_scratch) e = dlogits;
      sums[row - first] = signed_row<A>(logits, dlogits, logits + a.logits_stride, dlogits + a.dlogits_stride, e, a.classes, a.target[row], coef[row]);
    }
    for (int64_t row = first; row < last; ++row) {
      if (coef[row] == 0) continue; // row_loss starts as 0
      const RowSums<A>& s = sums[row - first];
      const A loss = row_loss(std::log(s.denominator), s.shifted, s.rest, s.denominator);
      a.row_loss[row] = static_cast<double>(coef[row]) * static_cast<double>(loss);
    }
  }
}

} // namespace zsu::ZSU_ISA
