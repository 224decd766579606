"""The schema of every op in the namespace ``zsu_fast``; a test compares it with ``csrc/ops.cpp``.

It defines the ops where the native library is absent, so that ``torch.ops.zsu_fast`` always has
them.
"""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    "signed_cross_entropy": (
        "(Tensor logits, Tensor target, Tensor coef) -> (Tensor losses, Tensor dlogits)"
    ),
    "masked_cross_entropy": (
        "(Tensor logits, Tensor teacher, Tensor forget, Tensor coef, Tensor? index=None,"
        " Tensor? keep=None, float shift=0.0, bool forget_only=False)"
        " -> (Tensor loss, Tensor dlogits)"
    ),
    "scale_rows_": "(Tensor(a!) rows, Tensor coef, Tensor grad) -> ()",
    "ascent_step_": (
        "(Tensor(a!) x, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step,"
        " Tensor active, Tensor low, Tensor high, Tensor lr, Tensor beta,"
        " float beta1=0.9, float beta2=0.999, float eps=1e-08) -> ()"
    ),
    "winograd_conv": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? other, int outputs, int padding,"
        " float low, float high) -> Tensor"
    ),
    "max_pool": (
        "(Tensor x, int kernel, int stride, int padding, int out_height, int out_width, bool relu)"
        " -> (Tensor out, Tensor place)"
    ),
    "max_pool_backward": (
        "(Tensor grad, Tensor place, int kernel, int stride, int padding, int height, int width)"
        " -> Tensor"
    ),
    "conv_input_gradient": (
        "(Tensor grad, Tensor weight, int stride, int top, int left, int height, int width)"
        " -> Tensor"
    ),
    "blocked_conv": (
        "(Tensor x, Tensor weight, Tensor? bias, int top, int left, int out_height, int out_width)"
        " -> Tensor"
    ),
}
# Without kernels for GPUs, on which no part of the package calls them.
CPU_ONLY = (
    "winograd_conv", "max_pool", "max_pool_backward", "conv_input_gradient", "blocked_conv",
)  # fmt: skip
