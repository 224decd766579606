// An op that refuses whatever it gets: setup.py tests with it, without a GPU, that a refusal by code that
// nvcc has compiled raises an exception.
#include "../refusal.h" // before torch's headers

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace zsu::cuda {
namespace {

void refuse_on_purpose(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.dim() < 0, "refused on purpose: ", x.dim(), " dimensions");
}

} // namespace
} // namespace zsu::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(zsu_fast, m) { m.def("_refuse(Tensor x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(zsu_fast, CPU, m) { m.impl("_refuse", TORCH_BOX(&zsu::cuda::refuse_on_purpose)); }
