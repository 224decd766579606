"""MaskedKL cross-entropy (the default objective), forward and backward: ours, eager, Inductor.

    pytest benchmarks/ops/bench_masked_cross_entropy.py

`eager` is KL(masked softmax of the teacher || softmax of the student) in plain torch with autograd.
The floor is two reads and one write (``torch.add(student, teacher, out=...)``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Contender, Table, compare, rotate
from zsu_fast import ops
from zsu_fast.ops import backends, reference

CASES = [(256, 10), (256, 1000), (4096, 1000)]
if DEVICE == "cuda":
    CASES += [(65536, 1000)]


@pytest.mark.parametrize(("rows", "classes"), CASES, ids=lambda v: str(v))
def test_masked_cross_entropy(benchmark: Any, table: Table, rows: int, classes: int) -> None:
    count = 3
    following = rotate(count)
    students = [torch.randn(rows, classes, device=DEVICE, requires_grad=True) for _ in range(count)]
    bare = [x.detach() for x in students]
    teacher = torch.randn(rows, classes, device=DEVICE)
    forget = torch.arange(classes, device=DEVICE) % 10 == 3
    coef = torch.full((rows,), 1.0 / rows, device=DEVICE)
    out = torch.empty(rows, classes, device=DEVICE)
    exact = [
        reference.masked_cross_entropy(x.double(), teacher.double(), forget, coef.double())[1]
        for x in bare
    ]
    at = 0

    def pick() -> Tensor:
        nonlocal at
        at = following()
        return students[at]

    def bare_pick() -> Tensor:
        pick()
        return bare[at]

    def with_autograd(loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x = pick()
            (grad,) = torch.autograd.grad(loss(x), x)
            return grad

        return run

    def verify(grad: Tensor) -> None:
        torch.testing.assert_close(grad.double(), exact[at], rtol=1e-4, atol=2e-6 / rows)

    def eager(x: Tensor) -> Tensor:
        log_q = teacher.masked_fill(forget, -torch.inf).log_softmax(1)
        q = log_q.exp()
        terms = q * (log_q.masked_fill(forget, 0) - x.log_softmax(1))
        return (terms.sum(1) * coef).sum()

    def ours(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.masked_cross_entropy(x, teacher, forget, coef, backend=backend)

    def direct(backend: str) -> Callable[[], Tensor]:
        return lambda: ops.masked_cross_entropy_and_grad(
            bare_pick(), teacher, forget, coef, backend=backend
        )[1]

    contenders = [
        Contender("eager", with_autograd(eager), verify),
        Contender("Inductor", with_autograd(torch.compile(eager, dynamic=False)), verify),
    ]
    native = [b for b in ("cpp", "cuda", "triton") if not backends.why_unavailable(b, DEVICE)]
    for backend in native:
        contenders.append(Contender(backend, with_autograd(ours(backend)), verify))
        contenders.append(Contender(f"{backend}, no autograd", direct(backend), verify))
    contenders.append(Contender("floor: add", lambda: torch.add(bare_pick(), teacher, out=out)))
    compare(
        table, f"{rows} x {classes} float32", contenders, floor="floor: add",
        floor_bytes=3 * 4 * rows * classes,
    )  # fmt: skip
    fastest = next(c for c in contenders if c.name == native[0])
    benchmark.pedantic(fastest.run, rounds=20, warmup_rounds=3)
