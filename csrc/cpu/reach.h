// Which windows of a convolution or of pooling a pixel is in.
#pragma once

#include "../math.h"

namespace zsu::ZSU_ISA {

// Along one dimension: the windows, [first, last], and the pixel's index in the first one; it falls by the stride from
// one to the next. `at` counts from the start of the padding, and there are `windows` of them.
struct Reach {
  int64_t first, last, index;
};
ZSU_INLINE Reach reach(int64_t at, int64_t kernel, int64_t stride, int64_t windows) {
  const int64_t first = at < kernel ? 0 : (at - kernel) / stride + 1;
  const int64_t last = at / stride < windows - 1 ? at / stride : windows - 1;
  return {first, last, at - first * stride};
}

} // namespace zsu::ZSU_ISA
