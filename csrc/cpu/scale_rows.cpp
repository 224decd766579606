#include "dispatch.h"

#include <torch/csrc/stable/library.h>

namespace zsu {
namespace {

void scale_rows_(const Tensor& rows, const Tensor& coef, const Tensor& grad) {
  check_scale_rows(rows, coef, grad);
  const Numbers factors(grad);
  const double forget = factors[0], retain = grad.numel() == 2 ? factors[grad.stride(0)] : forget;
  if (forget == 1 && retain == 1) return; // the usual case: no pass over memory
  const Tensor coefs = contiguous_as(coef, accumulator_of(rows));
  const ScaleRowsArgs args{
      rows.mutable_data_ptr(), rows.size(0) ? rows.stride(0) : 0, rows.size(1), coefs.const_data_ptr(), {forget, retain}};
  run_rows(kernels().scale_rows[static_cast<int>(storage_of(rows))], args, rows.size(0), rows.size(1));
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("scale_rows_", TORCH_BOX(&zsu::scale_rows_));
}
