"""The inner steps of unlearning as ops: one name each, on every backend.

| op                   | what it does                                    | used by                 |
|----------------------|-------------------------------------------------|-------------------------|
| ascent_step_         | one clamped Adam step of a batch of impressions | the ascent              |
| masked_cross_entropy | KL to the masked original model                 | objective "masked"      |
| signed_cross_entropy | descent on retain rows, ascent on forget rows   | objective "differential"|
| scale_rows_          | scales a saved gradient                         | backward of the losses  |
| winograd_conv        | a convolution of 3x3 with constant weights      | the ascent, on a CPU    |
| max_pool             | max pooling, with relu; max_pool_backward       | the ascent, on a CPU    |
| conv_input_gradient  | the gradient of a convolution's image           | the ascent, on a CPU    |
| blocked_conv         | a convolution of blocks of 16 images            | the ascent, on a CPU    |

The losses return a loss that autograd differentiates; ``*_and_grad`` returns the gradient with it,
without autograd, which is what training loops call. Ops that end in ``_`` change their arguments.

The pieces of an op have its name everywhere (`docs/add_an_op.md` lists them in order):

- ``schemas.py`` and ``csrc/ops.cpp``: the schema, in the namespace ``torch.ops.zsu_fast``;
- ``reference.py``: the truth in plain torch, against which every kernel is tested;
- ``<op>.py``: the public function, its fake implementation and its autograd registration;
- ``triton/<op>.py``, ``csrc/cpu/<op>.cpp`` with ``<op>_kernel.h``, ``csrc/cuda/<op>.cu``: kernels;
- ``tests/ops/test_<op>.py`` and the benchmark ``bench_<op>.py``.

``backends`` chooses the code that runs an op, ``library`` loads the native libraries.
"""

from .ascent_step import ascent_step_
from .backends import BackendUnavailable, use_backend
from .masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_and_grad
from .signed_cross_entropy import signed_cross_entropy, signed_cross_entropy_and_grad

__all__ = [
    "BackendUnavailable",
    "ascent_step_",
    "masked_cross_entropy",
    "masked_cross_entropy_and_grad",
    "signed_cross_entropy",
    "signed_cross_entropy_and_grad",
    "use_backend",
]
