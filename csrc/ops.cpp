// The schemas of every op. zsu_fast/ops/schemas.py holds the same table for installations without this
// library; tests/test_build.py compares the two.
#include "refusal.h" // before torch's headers

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(zsu_fast, m) {
  m.def("signed_cross_entropy(Tensor logits, Tensor target, Tensor coef) -> (Tensor losses, Tensor dlogits)");
  m.def(
      "masked_cross_entropy(Tensor logits, Tensor teacher, Tensor forget, Tensor coef, Tensor? index=None, "
      "Tensor? keep=None, float shift=0.0, bool forget_only=False) -> (Tensor loss, Tensor dlogits)");
  m.def("scale_rows_(Tensor(a!) rows, Tensor coef, Tensor grad) -> ()");
  m.def(
      "ascent_step_(Tensor(a!) x, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, "
      "Tensor active, Tensor low, Tensor high, Tensor lr, Tensor beta, float beta1=0.9, float beta2=0.999, "
      "float eps=1e-08) -> ()");
  m.def(
      "winograd_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? other, int outputs, int padding, float low, float high)"
      " -> Tensor");
  m.def(
      "max_pool(Tensor x, int kernel, int stride, int padding, int out_height, int out_width, bool relu) "
      "-> (Tensor out, Tensor place)");
  m.def(
      "max_pool_backward(Tensor grad, Tensor place, int kernel, int stride, int padding, int height, int width) "
      "-> Tensor");
  m.def(
      "conv_input_gradient(Tensor grad, Tensor weight, int stride, int top, int left, int height, "
      "int width) -> Tensor");
  m.def(
      "blocked_conv(Tensor x, Tensor weight, Tensor? bias, int top, int left, int out_height, int out_width) -> Tensor");
}
