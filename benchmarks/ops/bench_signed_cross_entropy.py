"""Signed cross-entropy, forward and backward: ours, eager, Inductor, Liger-Kernel.

    pytest benchmarks/ops/bench_signed_cross_entropy.py

`eager` is ``(F.cross_entropy(x, t, reduction="none") * coef).sum()`` with autograd: one number.
`eager, two terms` is the formula of the paper, a mean over forget and one over retain rows: what
our op returns. `no autograd` is the call of training loops: losses and gradient of the logits. The
floor is one read and one write of the logits (`copy_` into allocated memory).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, Contender, RotatingLogits, Table, compare
from zsu_fast import ops
from zsu_fast.ops import backends, reference

CASES = [(256, 10), (256, 1000), (4096, 1000)]
if DEVICE == "cuda":
    CASES += [(65536, 1000), (4096, 32000)]

CPU_NOTES = [
    "x floor: multiples of one read and one write of the logits, measured in the same rounds."
    " At 256 rows the call itself, not memory, is the cost.",
    "Inductor compiles `eager`; GB/s counts one read and one write. `eager` and `Inductor`"
    " return one loss; `two terms` the forget and the retain loss, added up by the caller.",
    "Through autograd, 256 x 10 costs what Python and the engine cost: a backward pass of"
    " x.sum() alone takes 18 us of the 40 us that ours takes at best. Tried there (CPU time of"
    " one call at best, from 52 us): outputs allocated without looking an op up by name, -1 us;"
    " short rows and their logarithms in whole vectors, -2 us; saved coefficients as an"
    " attribute instead of a saved tensor, less than 1 us (not kept); bypassing the Python of"
    " Function.apply, nothing (not kept). Autograd in C++ is not possible: the stable ABI has no"
    " autograd header. On a busy machine the engine costs every contender some 60 us more, and"
    " the ratio falls from between 2.2 and 2.9 to about 1.7.",
    "At 1000 classes, a row in cache went from about 360 to 280 ns. One pass for maximum and"
    " exponentials, and 14 instead of 18 vector operations per exponential, gained nothing as"
    " long as the loop was split at the target (mispredicted branches, we suppose); without the"
    " split they do.",
]
GPU_NOTES = [
    "x floor: multiples of one read and one write of the logits, measured in the same rounds; GB/s"
    " counts these too. `no autograd` is the call of the training loop.",
    "Through autograd, one more kernel checks on the device whether the incoming gradient is 1: 43"
    " us for the 65,536 blocks of 65,536 rows.",
]


class Case(RotatingLogits):
    """Logits of one shape and dtype, in three copies that take turns, and the exact gradients."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        leaves = [
            torch.randn(rows, classes, device=DEVICE).to(dtype).requires_grad_() for _ in range(3)
        ]
        super().__init__(leaves)
        self.target = torch.randint(classes, (rows,), device=DEVICE)
        self.forget = torch.rand(rows, device=DEVICE) < 0.3
        self.coef = torch.where(self.forget, -0.9 / self.forget.sum(), 0.1 / (~self.forget).sum())
        self.exact = [
            reference.signed_cross_entropy(x.double(), self.target, self.coef.double())[1]
            for x in self.logits
        ]

    def verify(self, grad: Tensor) -> None:
        tolerance = 2e-6 if self.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(
            grad.double(), self.exact[self.at], rtol=1e-4 if self.dtype == torch.float32 else 1e-2,
            atol=tolerance * float(self.coef.abs().max()),
        )  # fmt: skip

    def eager(self, x: Tensor) -> Tensor:
        return (F.cross_entropy(x, self.target, reduction="none") * self.coef).sum()

    def two_terms(self, x: Tensor) -> Tensor:
        forget, target = self.forget, self.target
        return -0.9 * F.cross_entropy(x[forget], target[forget]) + 0.1 * F.cross_entropy(
            x[~forget], target[~forget]
        )


def ours(case: Case, backend: str) -> list[Contender]:
    """Our op on one backend, through autograd and without it."""

    def terms(x: Tensor) -> Tensor:
        return ops.signed_cross_entropy(x, case.target, case.coef, backend=backend).sum()

    def without_autograd() -> Tensor:
        return ops.signed_cross_entropy_and_grad(
            case.next_logits(), case.target, case.coef, backend=backend
        )[1]

    return [
        Contender(f"{backend}, two terms", case.with_autograd(terms), case.verify),
        Contender(f"{backend}, no autograd", without_autograd, case.verify),
    ]


def liger(case: Case) -> list[Contender]:
    """Liger-Kernel's cross-entropy, which runs on CUDA only; none if it is not installed."""
    if DEVICE != "cuda":
        return []
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return []
    run = case.with_autograd(lambda x: liger_cross_entropy(x.clone(), case.target))
    return [Contender("Liger (mean, unsigned)", run)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "classes"), CASES, ids=lambda v: str(v))
def test_signed_cross_entropy(
    benchmark: Any, table: Table, rows: int, classes: int, dtype: torch.dtype
) -> None:
    case = Case(rows, classes, dtype)
    copied = torch.empty(rows, classes, dtype=dtype, device=DEVICE)
    compiled = torch.compile(case.eager, dynamic=False)
    native = [b for b in ("cpp", "cuda", "triton") if not backends.why_unavailable(b, DEVICE)]
    contenders = [
        Contender("eager", case.with_autograd(case.eager), case.verify),
        Contender("eager, two terms", case.with_autograd(case.two_terms), case.verify),
        Contender("Inductor", case.with_autograd(compiled), case.verify),
        *(contender for backend in native for contender in ours(case, backend)),
        *liger(case),
        Contender("floor: copy", lambda: copied.copy_(case.next_logits())),
    ]
    name = f"{rows} x {classes} {str(dtype).removeprefix('torch.')}"
    moved = 2 * rows * classes * copied.element_size()
    compare(table, name, contenders, floor="floor: copy", floor_bytes=moved)
    if not table.notes:
        table.notes = GPU_NOTES if DEVICE == "cuda" else CPU_NOTES
    fastest = next(c for c in contenders if c.name == f"{native[0]}, two terms")
    benchmark.pedantic(fastest.run, rounds=20, warmup_rounds=3)
