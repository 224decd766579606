#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

void check_used_targets(const int64_t* target, const Numbers& coef, int64_t rows, int64_t classes) {
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] >= 0 && target[i] < classes) continue;
    STD_TORCH_CHECK(
        coef[i] == 0, "target ", target[i], " of row ", i, " is out of range for ", classes, " classes");
  }
}

std::tuple<Tensor, Tensor> signed_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& coef) {
  const SignedCrossEntropyInputs in = signed_cross_entropy_inputs(logits, target, coef);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const int64_t* targets = in.target.const_data_ptr<int64_t>();
  const Numbers coefs(in.coef);
  check_used_targets(targets, coefs, rows, classes);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  std::vector<double> row_loss(static_cast<size_t>(rows));
  const SignedCrossEntropyArgs args{
      in.logits.const_data_ptr(), rows ? in.logits.stride(0) : 0, dlogits.mutable_data_ptr(), rows ? dlogits.stride(0) : 0,
      classes, targets, coefs.data, row_loss.data()};
  run_rows(kernels().signed_cross_entropy[static_cast<int>(storage_of(logits))], args, rows, classes);

  double sums[2] = {0, 0}; // in one order, whatever the number of threads
  for (int64_t i = 0; i < rows; ++i) sums[coefs[i] < 0 ? 0 : 1] += row_loss[static_cast<size_t>(i)];
  const Tensor losses = empty_like(logits, {2}, accumulator_of(logits));
  for (int k = 0; k < 2; ++k) set_number(losses, k, sums[k]);
  return {losses, dlogits};
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("signed_cross_entropy", TORCH_BOX(&zsu::signed_cross_entropy));
}
