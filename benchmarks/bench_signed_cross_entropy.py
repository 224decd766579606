"""Signed cross-entropy, forward and backward: ours, eager, Inductor, Liger-Kernel.

    pytest benchmarks/bench_signed_cross_entropy.py

`eager` is ``(F.cross_entropy(x, t, reduction="none") * coef).sum()`` with autograd: one number.
`eager, two terms` is the formula of the paper, a mean over forget and one over retain rows: what
our op returns. `ours, no autograd` is the call that training loops use: losses and gradient of
the logits. The floor is one read and one write of the logits (`copy_` into memory that is there).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Contender, Table, compare, rotate
from torch import Tensor

from zsu_fast import ops
from zsu_fast.ops import backends, reference

CASES = [(256, 10), (256, 1000), (4096, 1000)]
if DEVICE == "cuda":
    CASES += [(65536, 1000), (4096, 32000)]

CPU_NOTES = [
    "x floor: times one read and one write of the logits, measured in the same rounds."
    " At 256 rows the call itself, not memory, is the cost.",
    "Inductor compiles `eager`; GB/s counts one read and one write. `eager` and `Inductor`"
    " return one loss; `two terms` the forget and the retain loss, added up by the caller.",
    "Through autograd, 256 x 10 costs what Python and the engine cost: a backward pass of"
    " x.sum() alone takes 18 us of the 40 us that ours takes at best. Tried there, CPU time"
    " of one call at best, from 52 us: outputs allocated without looking an op up by name -1 us;"
    " short rows and their logarithms in whole vectors -2 us; saved"
    " coefficients as an attribute instead of a saved tensor, less than 1 us (not kept);"
    " past Function.apply's own Python, nothing (not kept). Autograd in C++ is not to be"
    " had: the stable ABI has no autograd header. Beside busy processes the engine costs"
    " every contender some 60 us more, and the ratio falls from 2.2 to 2.9 towards 1.7.",
    "At 1000 classes, a row in cache went from about 360 to 280 ns. One pass for maximum"
    " and exponentials, and 14 instead of 18 vector operations an exponential, gave nothing"
    " alone while the loop was split at the target (wrongly guessed branches, we suppose);"
    " without the split they count.",
]
GPU_NOTES = [
    "x floor: times one read and one write of the logits, measured in the same rounds; GB/s counts"
    " these too. `no autograd` is what the training loop calls.",
    "Through autograd, one more kernel asks on the device whether the incoming gradient is 1: 43 us"
    " for the 65,536 blocks of as many rows.",
]


def liger() -> Callable[..., Any] | None:
    """Liger-Kernel's cross-entropy, which runs on CUDA only."""
    if DEVICE != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "classes"), CASES, ids=lambda v: str(v))
def test_signed_cross_entropy(
    benchmark: Any, table: Table, rows: int, classes: int, dtype: torch.dtype
) -> None:
    count = 3
    following = rotate(count)
    inputs = [
        torch.randn(rows, classes, device=DEVICE).to(dtype).requires_grad_() for _ in range(count)
    ]
    bare = [x.detach() for x in inputs]
    target = torch.randint(classes, (rows,), device=DEVICE)
    forget = torch.rand(rows, device=DEVICE) < 0.3
    coef = torch.where(forget, -0.9 / forget.sum(), 0.1 / (~forget).sum())
    copied = torch.empty(rows, classes, dtype=dtype, device=DEVICE)
    exact = [reference.signed_cross_entropy(x.double(), target, coef.double())[1] for x in bare]
    at = 0

    def pick() -> Tensor:
        nonlocal at
        at = following()
        return inputs[at]

    def with_autograd(loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x = pick()
            (grad,) = torch.autograd.grad(loss(x), x)
            return grad

        return run

    def verify(grad: Tensor) -> None:
        tolerance = 2e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(
            grad.double(), exact[at], rtol=1e-4 if dtype == torch.float32 else 1e-2,
            atol=tolerance * float(coef.abs().max()),
        )  # fmt: skip

    def eager(x: Tensor) -> Tensor:
        return (F.cross_entropy(x, target, reduction="none") * coef).sum()

    def two_terms(x: Tensor) -> Tensor:
        return -0.9 * F.cross_entropy(x[forget], target[forget]) + 0.1 * F.cross_entropy(
            x[~forget], target[~forget]
        )

    def our_terms(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.signed_cross_entropy(x, target, coef, backend=backend).sum()

    def direct(backend: str) -> Callable[[], Tensor]:
        return lambda: ops.signed_cross_entropy_and_grad(
            bare_pick(), target, coef, backend=backend
        )[1]

    def bare_pick() -> Tensor:
        pick()
        return bare[at]

    contenders = [
        Contender("eager", with_autograd(eager), verify),
        Contender("eager, two terms", with_autograd(two_terms), verify),
        Contender("Inductor", with_autograd(torch.compile(eager, dynamic=False)), verify),
    ]
    native = [b for b in ("cpp", "cuda", "triton") if not backends.why_unavailable(b, DEVICE)]
    for backend in native:
        contenders.append(
            Contender(f"{backend}, two terms", with_autograd(our_terms(backend)), verify)
        )
        contenders.append(Contender(f"{backend}, no autograd", direct(backend), verify))
    if (cross_entropy := liger()) is not None:
        contenders.append(
            Contender(
                "Liger (mean, unsigned)",
                with_autograd(lambda x: cross_entropy(x.clone(), target)),
            )
        )
    contenders.append(Contender("floor: copy", lambda: copied.copy_(bare_pick())))
    name = f"{rows} x {classes} {str(dtype).removeprefix('torch.')}"
    moved = 2 * rows * classes * copied.element_size()
    compare(table, name, contenders, floor="floor: copy", floor_bytes=moved)
    if not table.notes:
        table.notes = GPU_NOTES if DEVICE == "cuda" else CPU_NOTES
    fastest = next(c for c in contenders if c.name == f"{native[0]}, two terms")
    benchmark.pedantic(fastest.run, rounds=20, warmup_rounds=3)
