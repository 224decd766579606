#include "dispatch.h"

#include <torch/csrc/stable/library.h>

namespace zsu {
namespace {

void ascent_step_(
    const Tensor& x, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,
    const Tensor& active, const Tensor& low, const Tensor& high, const Tensor& lr, const Tensor& beta,
    double beta1, double beta2, double eps) {
  const AscentStepArgs args{
      ascent_step_tensors(x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta), beta1, beta2, eps};
  if (args.row_size > 0) run_rows(kernels().ascent_step, args, args.rows, args.row_size); // rows without channels have no bounds
  int32_t* steps = step.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < args.rows; ++i) steps[i] += args.active[i] ? 1 : 0;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("ascent_step_", TORCH_BOX(&zsu::ascent_step_));
}
