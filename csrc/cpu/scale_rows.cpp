#include "dispatch.h"

#include <torch/csrc/stable/library.h>

namespace zsu {
namespace {

void scale_rows_(const Tensor& rows, const Tensor& coef, const Tensor& grad) {
  check_scale_rows(rows, coef, grad);
  const auto number = [&](int64_t i) {
    const int64_t at = grad.dim() ? i * grad.stride(0) : 0;
    return grad.scalar_type() == ScalarType::Double ? grad.const_data_ptr<double>()[at] : grad.const_data_ptr<float>()[at];
  };
  const double forget = number(0), retain = number(grad.numel() - 1);
  if (forget == 1 && retain == 1) return; // the usual case: no pass over memory
  const Tensor coefs = contiguous_as(coef, accumulator_of(rows));
  const ScaleRowsArgs args{rows.mutable_data_ptr(), rows.size(0) ? rows.stride(0) : 0, rows.size(1), coefs.const_data_ptr(), {forget, retain}};
  const auto kernel = kernels().scale_rows[static_cast<int>(storage_of(rows))];
  torch::stable::parallel_for(0, rows.size(0), grain(rows.size(1)), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("scale_rows_", TORCH_BOX(&zsu::scale_rows_));
}
