// From tensors to the kernels of this CPU.
#pragma once

#include "../checks.h"
#include "kernels.h"

#include <vector>

namespace zsu {

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: return Storage::float32;
  }
}

// Rows a thread should take at least, so that small batches stay on one thread.
inline int64_t grain(int64_t row_size) {
  return row_size > 0 ? (32768 + row_size - 1) / row_size : 32768;
}

} // namespace zsu
