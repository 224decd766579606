#include "dispatch.h"

#include <torch/csrc/stable/library.h>

namespace zsu {
namespace {

void ascent_step_(
    const Tensor& x, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,
    const Tensor& active, const Tensor& low, const Tensor& high, const Tensor& lr, const Tensor& beta,
    double beta1, double beta2, double eps) {
  const AscentLayout layout = check_ascent_step(x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta);
  AscentStepArgs args{};
  args.x = x.mutable_data_ptr<float>();
  args.grad = grad.const_data_ptr<float>();
  args.exp_avg = exp_avg.mutable_data_ptr<float>();
  args.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  args.step = step.const_data_ptr<int32_t>();
  args.active = active.const_data_ptr<bool>();
  args.row_size = layout.row_size;
  args.bounds = layout.bounds;
  args.channels = layout.channels;
  args.channels_last = layout.channels_last;
  args.low = low.const_data_ptr<float>();
  args.high = high.const_data_ptr<float>();
  args.lr = lr.const_data_ptr<float>();
  args.lr_stride = lr.numel() > 1 ? 1 : 0;
  args.beta = *beta.const_data_ptr<float>();
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;

  const auto kernel = kernels().ascent_step;
  torch::stable::parallel_for(
      0, layout.rows, grain(layout.row_size), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  int32_t* steps = step.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < layout.rows; ++i) steps[i] += args.active[i] ? 1 : 0;
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("ascent_step_", TORCH_BOX(&zsu::ascent_step_));
}
