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

// The least number of rows per thread; it keeps small batches on one thread.
inline int64_t grain(int64_t row_size) {
  return row_size > 0 ? (32768 + row_size - 1) / row_size : 32768;
}

// Runs a kernel over all rows, on torch's threads.
template <class Args>
void run_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t row_size) {
  torch::stable::parallel_for(
      0, rows, grain(row_size), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Reads the numbers of a float or double tensor.
struct Numbers {
  const void* data;
  bool is_double;
  explicit Numbers(const Tensor& t) : data(t.const_data_ptr()), is_double(t.scalar_type() == ScalarType::Double) {}
  double operator[](int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
};

inline void set_number(const Tensor& t, int64_t index, double value) {
  if (t.scalar_type() == ScalarType::Double) t.mutable_data_ptr<double>()[index] = value;
  else t.mutable_data_ptr<float>()[index] = static_cast<float>(value);
}

} // namespace zsu
