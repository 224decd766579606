"""Masked cross-entropy (the default objective), forward and backward: ours, eager, Inductor.

    pytest benchmarks/ops/bench_masked_cross_entropy.py

`eager` is KL(masked softmax of the teacher || softmax of the student) in plain torch with autograd.
The floor is two reads and one write (``torch.add(student, teacher, out=...)``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Contender, RotatingLogits, Table, compare
from zsu_fast import ops
from zsu_fast.ops import backends, reference

CASES = [(256, 10), (256, 1000), (4096, 1000)]
if DEVICE == "cuda":
    CASES += [(65536, 1000)]


class Case(RotatingLogits):
    """Students of one shape, in three copies that take turns, and the exact gradients."""

    def __init__(self, rows: int, classes: int) -> None:
        leaves = [torch.randn(rows, classes, device=DEVICE, requires_grad=True) for _ in range(3)]
        super().__init__(leaves)
        self.teacher = torch.randn(rows, classes, device=DEVICE)
        self.forget = torch.arange(classes, device=DEVICE) % 10 == 3
        self.coef = torch.full((rows,), 1.0 / rows, device=DEVICE)
        exact = self.teacher.double(), self.forget, self.coef.double()
        self.exact = [reference.masked_cross_entropy(x.double(), *exact)[1] for x in self.logits]

    def verify(self, grad: Tensor) -> None:
        torch.testing.assert_close(
            grad.double(), self.exact[self.at], rtol=1e-4, atol=2e-6 / len(grad)
        )

    def eager(self, x: Tensor) -> Tensor:
        log_q = self.teacher.masked_fill(self.forget, -torch.inf).log_softmax(1)
        q = log_q.exp()
        terms = q * (log_q.masked_fill(self.forget, 0) - x.log_softmax(1))
        return (terms.sum(1) * self.coef).sum()


def ours(case: Case, backend: str) -> list[Contender]:
    """Our op on one backend, through autograd and without it."""
    rest = case.teacher, case.forget, case.coef

    def loss(x: Tensor) -> Tensor:
        return ops.masked_cross_entropy(x, *rest, backend=backend)

    def without_autograd() -> Tensor:
        return ops.masked_cross_entropy_and_grad(case.next_logits(), *rest, backend=backend)[1]

    return [
        Contender(backend, case.with_autograd(loss), case.verify),
        Contender(f"{backend}, no autograd", without_autograd, case.verify),
    ]


@pytest.mark.parametrize(("rows", "classes"), CASES, ids=lambda v: str(v))
def test_masked_cross_entropy(benchmark: Any, table: Table, rows: int, classes: int) -> None:
    case = Case(rows, classes)
    out = torch.empty(rows, classes, device=DEVICE)
    compiled = torch.compile(case.eager, dynamic=False)
    native = [b for b in ("cpp", "cuda", "triton") if not backends.why_unavailable(b, DEVICE)]
    contenders = [
        Contender("eager", case.with_autograd(case.eager), case.verify),
        Contender("Inductor", case.with_autograd(compiled), case.verify),
        *(contender for backend in native for contender in ours(case, backend)),
        Contender("floor: add", lambda: torch.add(case.next_logits(), case.teacher, out=out)),
    ]
    compare(
        table, f"{rows} x {classes} float32", contenders, floor="floor: add",
        floor_bytes=3 * 4 * rows * classes,
    )  # fmt: skip
    fastest = next(c for c in contenders if c.name == native[0])
    benchmark.pedantic(fastest.run, rounds=20, warmup_rounds=3)
