#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace zsu {
namespace {

std::tuple<Tensor, Tensor> masked_cross_entropy(
    const Tensor& logits, const Tensor& teacher, const Tensor& forget, const Tensor& coef) {
  const auto [x, z, mask, coefs] = masked_inputs(logits, teacher, forget, coef);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType accumulator = accumulator_of(logits);
  const Tensor dlogits = empty_like(logits, {rows, classes}, logits.scalar_type());
  std::vector<double> row_loss(static_cast<size_t>(rows));
  const MaskedCrossEntropyArgs args{
      x.const_data_ptr(), rows ? x.stride(0) : 0, z.const_data_ptr(), rows ? z.stride(0) : 0, mask.const_data_ptr<bool>(),
      dlogits.mutable_data_ptr(), classes, coefs.const_data_ptr(), row_loss.data()};
  const auto kernel = kernels().masked_cross_entropy[static_cast<int>(storage_of(logits))];
  torch::stable::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

  double sum = 0;
  for (const double loss : row_loss) sum += loss;
  const Tensor loss = torch::stable::new_empty(logits, {}, accumulator);
  if (accumulator == ScalarType::Double) *loss.mutable_data_ptr<double>() = sum;
  else *loss.mutable_data_ptr<float>() = static_cast<float>(sum);
  return {loss, dlogits};
}

} // namespace
} // namespace zsu

STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&zsu::masked_cross_entropy));
}
