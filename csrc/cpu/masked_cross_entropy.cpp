#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

std::tuple<Tensor, Tensor> masked_cross_entropy(
    const Tensor& logits, const Tensor& teacher, const Tensor& forget, const Tensor& coef) {
  const MaskedCrossEntropyInputs in = masked_cross_entropy_inputs(logits, teacher, forget, coef);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  std::vector<double> row_loss(static_cast<size_t>(rows));
  const MaskedCrossEntropyArgs args{
      in.logits.const_data_ptr(), rows ? in.logits.stride(0) : 0, in.teacher.const_data_ptr(),
      rows ? in.teacher.stride(0) : 0, in.forget.const_data_ptr<bool>(), dlogits.mutable_data_ptr(), classes,
      in.coef.const_data_ptr(), row_loss.data()};
  run_rows(kernels().masked_cross_entropy[static_cast<int>(storage_of(logits))], args, rows, classes);

  double sum = 0; // in one order, whatever the number of threads
  for (const double loss : row_loss) sum += loss;
  const Tensor loss = torch::stable::new_empty(logits, {}, accumulator_of(logits));
  set_number(loss, 0, sum);
  return {loss, dlogits};
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&zsu::masked_cross_entropy));
}
