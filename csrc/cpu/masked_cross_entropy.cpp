#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

void check_used_indices(const int64_t* index, const Numbers& coef, int64_t rows, int64_t teacher_rows) {
  for (int64_t i = 0; i < rows; ++i) {
    if (index[i] >= 0 && index[i] < teacher_rows) continue;
    STD_TORCH_CHECK(
        coef[i] == 0, "index ", index[i], " of row ", i, " is out of range for ", teacher_rows, " rows");
  }
}

std::tuple<Tensor, Tensor> masked_cross_entropy(
    const Tensor& logits, const Tensor& teacher, const Tensor& forget, const Tensor& coef,
    const std::optional<Tensor>& index, const std::optional<Tensor>& keep, double shift, bool forget_only) {
  const MaskedCrossEntropyInputs in = masked_cross_entropy_inputs(logits, teacher, forget, coef, index, keep);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const int64_t* indices = in.index ? in.index->const_data_ptr<int64_t>() : nullptr;
  if (indices) check_used_indices(indices, Numbers(in.coef), rows, teacher.size(0));
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  std::vector<double> row_loss(static_cast<size_t>(rows));
  const MaskedCrossEntropyArgs args{
      in.logits.const_data_ptr(), rows ? in.logits.stride(0) : 0, in.teacher.const_data_ptr(),
      rows ? in.teacher.stride(0) : 0, indices, in.forget.const_data_ptr<bool>(), dlogits.mutable_data_ptr(), classes,
      in.coef.const_data_ptr(), in.keep ? in.keep->const_data_ptr() : nullptr, shift, forget_only, row_loss.data()};
  const Storage storage = storage_of(logits);
  const bool same = in.teacher.scalar_type() == logits.scalar_type();
  const int kernel = static_cast<int>(storage) + (same ? 0 : 2); // bfloat16 and float16 alone differ
  run_rows(kernels().masked_cross_entropy[kernel], args, rows, classes);

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
