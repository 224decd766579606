// Multiplies each row of a saved gradient by the incoming gradient of its term.
#pragma once

#include "simd.h"

namespace zsu::ZSU_ISA {

template <class A, class T>
void scale_rows_kernel(const ScaleRowsArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t width = Vec<A>::width;
  const int64_t vectorised = a.classes / width * width;
  for (int64_t row = begin; row < end; ++row) {
    const A factor = static_cast<A>(a.factor[static_cast<const A*>(a.coef)[row] < 0 ? 0 : 1]);
    T* p = static_cast<T*>(a.rows) + row * a.stride;
    for (int64_t i = 0; i < vectorised; i += width) store(p + i, load(p + i) * factor);
    for (int64_t i = vectorised; i < a.classes; ++i) from_float(to_float(p[i]) * factor, p[i]);
  }
}

} // namespace zsu::ZSU_ISA
