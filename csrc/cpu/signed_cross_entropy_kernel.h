// Loss and gradient of signed cross-entropy, row by row, in one pass over memory: the exponentials of a
// row stay in cache until their sum is known.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

// What determines the loss of a row. Its logarithm is taken later, for many rows at once.
template <class A>
struct RowSums {
  A shifted, rest, denominator;
};

// Sets e[i] = exp(logits[i]) for a whole row, and top to the largest logit; returns the sum of e.
template <class A, class T, class Exp>
ZSU_INLINE A exponentials(
    const T* logits, const T* next_logits, const T* next_dlogits, A* e, int64_t classes, A& top, Exp exp) {
  using V = typename Vec<A>::V;
  constexpr int64_t width = Vec<A>::width;
  const int64_t vectorised = classes / width * width;
  const V lowest = V{} - std::numeric_limits<A>::infinity();
  V tops = lowest, sums{};
  for (int64_t at = 0; at < vectorised;) { // short sums, then the sum of those: one sum of 32,000 terms loses a digit
    const int64_t stop = at + 64 * width < vectorised ? at + 64 * width : vectorised;
    V sum{};
    for (; at < stop; at += width) {
      __builtin_prefetch(next_logits + at);
      __builtin_prefetch(next_dlogits + at, 1);
      const V x = load(logits + at);
      tops = vmax(x, tops);
      const V v = exp(x);
      store(e + at, v);
      sum += v;
    }
    sums += sum;
  }
  if (vectorised < classes) {
    const V x = load_part<A>(logits + vectorised, classes - vectorised, lowest[0]);
    tops = vmax(x, tops);
    const V v = exp(x);
    store(e + vectorised, v);
    sums += v;
  }
  top = max_lanes(tops);
  return sum_lanes(sums);
}

// Sum of e without e[target]. `e` is padded with zeros to whole vectors.
template <class A>
ZSU_INLINE A sum_of_others(const A* e, int64_t classes, int64_t target) {
  using V = typename Vec<A>::V;
  constexpr int64_t width = Vec<A>::width;
  const int64_t target_block = target / width * width;
  V sums = V{};
  for (int64_t at = 0; at < classes;) {
    const int64_t stop = at + 64 * width < classes ? at + 64 * width : classes;
    V sum{};
    for (; at < stop; at += width) sum += at == target_block ? V{} : load(e + at);
    sums += sum;
  }
  return sum_lanes(sums + without_lane(load(e + target_block), static_cast<int>(target - target_block)));
}

template <class A, class T>
ZSU_INLINE A largest(const T* row, int64_t classes) {
  using V = typename Vec<A>::V;
  constexpr int64_t width = Vec<A>::width;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  V tops = V{} - infinity;
  int64_t i = 0;
  for (; i + width <= classes; i += width) tops = vmax(load(row + i), tops);
  if (i < classes) tops = vmax(load_part<A>(row + i, classes - i, -infinity), tops);
  return max_lanes(tops);
}

// Writes the gradient of one row. `e` is scratch for a row, padded to whole vectors. `guess`: whether the
// logits of the previous row were small; updated.
template <class A, class T>
ZSU_INLINE RowSums<A> signed_row(const SignedCrossEntropyArgs& a, int64_t row, A* e, bool& guess) {
  constexpr int64_t width = Vec<A>::width;
  const int64_t classes = a.classes, target = a.target[row];
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
  T* dlogits = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
  const T* next_logits = logits + a.logits_stride;
  const T* next_dlogits = dlogits + a.dlogits_stride;
  const A target_logit = to_float(logits[target]);
  // exp(x - top) needs the largest logit first, and the part of x - top that rounding drops. exp(x)
  // needs neither, and far from overflow it serves as well: the softmax is the same, and `scale`
  // corrects the sums. `exponential` is 0 below -86: with a largest logit of 0 or more, that drops no
  // more than x - top below -86 does.
  constexpr int64_t long_row = 128;
  const auto small = [](A largest_logit) ZSU_LAMBDA_INLINE { return largest_logit >= 0 && largest_logit <= 32; };
  A top = 0, scale = 1, sum = 0;
  bool done = false;
  if (__is_same(A, float) && classes >= long_row) {
    if (!guess) guess = small(largest<A>(logits, classes));
    if (guess) {
      sum = exponentials(logits, next_logits, next_dlogits, e, classes, top,
                         [](auto x) ZSU_LAMBDA_INLINE { return exponential(x, Nothing{}); });
      done = guess = small(top);
      if (done) scale = 1 / exponential(typename Vec<A>::V{} + top, Nothing{})[0];
    }
  }
  if (!done) {
    const A subtracted = largest<A>(logits, classes);
    sum = exponentials(logits, next_logits, next_dlogits, e, classes, top,
                       [subtracted](auto x) ZSU_LAMBDA_INLINE { return exp_of_difference(x, subtracted); });
  }
  // 1 - p is the sum of the *other* probabilities: subtracting p from 1 loses every digit as p -> 1
  const A at_target = e[target];
  const A rest = at_target <= sum / 4 ? sum - at_target : sum_of_others(e, classes, target);
  const A denominator = rest + at_target;

  const A factor = static_cast<const A*>(a.coef)[row] / denominator;
  int64_t i = 0;
  for (; i + width <= classes; i += width) store(dlogits + i, load(e + i) * factor);
  if (i < classes) store_part(dlogits + i, load(e + i) * factor, classes - i);
  from_float(-factor * rest, dlogits[target]);
  return {target_logit - top, rest * scale, denominator * scale};
}

template <class A, class T>
void signed_cross_entropy_kernel(const SignedCrossEntropyArgs& a, int64_t begin, int64_t end) {
  using V = typename Vec<A>::V;
  constexpr int64_t width = Vec<A>::width, chunk = 64;
  const Scratch<A> scratch((a.classes + width - 1) / width * width);
  A shifted[chunk], rest[chunk], denominator[chunk], loss[chunk];
  const A* coef = static_cast<const A*>(a.coef);
  bool guess = true;
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t count = end - first < chunk ? end - first : chunk;
    for (int64_t k = 0; k < chunk; ++k) {
      RowSums<A> sums{0, 0, 1}; // a loss of 0
      const int64_t row = first + k;
      if (k < count && coef[row] != 0) {
        sums = signed_row<A, T>(a, row, scratch.data, guess);
      } else if (k < count) {
        T* dlogits = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
        for (int64_t i = 0; i < a.classes; ++i) from_float(A(0), dlogits[i]);
      }
      shifted[k] = sums.shifted;
      rest[k] = sums.rest;
      denominator[k] = sums.denominator;
    }
    for (int64_t k = 0; k < count; k += width) {
      const V d = load(denominator + k);
      store(loss + k, row_loss(logarithm(d), load(shifted + k), load(rest + k), d));
    }
    for (int64_t k = 0; k < count; ++k)
      if (coef[first + k] != 0) // row_loss is 0 on entry
        a.row_loss[first + k] = static_cast<double>(coef[first + k]) * static_cast<double>(loss[k]);
  }
}

} // namespace zsu::ZSU_ISA
