#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

void check_used_targets(const int64_t* target, const void* coef, bool is_double, int64_t rows, int64_t classes) {
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] >= 0 && target[i] < classes) continue;
    const bool used = is_double ? static_cast<const double*>(coef)[i] != 0 : static_cast<const float*>(coef)[i] != 0;
    STD_TORCH_CHECK(!used, "target ", target[i], " of row ", i, " is out of range for ", classes, " classes");
  }
}

std::tuple<Tensor, Tensor> signed_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& coef) {
  check_signed_cross_entropy(logits, target, coef);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType accumulator = accumulator_of(logits);
  const Tensor x = with_dense_rows(logits);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  const Tensor targets = contiguous_as(target, ScalarType::Long);
  const Tensor coefs = contiguous_as(coef, accumulator);
  const auto* coef_data = coefs.const_data_ptr();
  check_used_targets(targets.const_data_ptr<int64_t>(), coef_data, accumulator == ScalarType::Double, rows, classes);

  std::vector<double> row_loss(static_cast<size_t>(rows));
  const SignedCrossEntropyArgs args{
      x.const_data_ptr(), rows ? x.stride(0) : 0, dlogits.mutable_data_ptr(), rows ? dlogits.stride(0) : 0,
      classes, targets.const_data_ptr<int64_t>(), coef_data, row_loss.data()};
  const auto kernel = kernels().signed_cross_entropy[static_cast<int>(storage_of(logits))];
  torch::stable::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

  double sums[2] = {0, 0}; // one order, however many threads there were
  for (int64_t i = 0; i < rows; ++i) {
    const bool forget = accumulator == ScalarType::Double ? static_cast<const double*>(coef_data)[i] < 0
                                                          : static_cast<const float*>(coef_data)[i] < 0;
    sums[forget ? 0 : 1] += row_loss[static_cast<size_t>(i)];
  }
  const Tensor losses = empty_like(logits, {2}, accumulator);
  for (int k = 0; k < 2; ++k) {
    if (accumulator == ScalarType::Double) losses.mutable_data_ptr<double>()[k] = sums[k];
    else losses.mutable_data_ptr<float>()[k] = static_cast<float>(sums[k]);
  }
  return {losses, dlogits};
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("signed_cross_entropy", TORCH_BOX(&zsu::signed_cross_entropy));
}
