"""Ascent step: one Adam step with L2 term and clamp on a batch of impressions.

    pytest benchmarks/ops/bench_ascent_step.py

`eager` is the step in plain torch, in place, written for speed: every row active, one step count
for all. It and `Inductor`, which compiles it, do less than the op. `Inductor, whole op` compiles
the package's plain-torch `reference`, with an active flag and a step count per row, as the ascent
has them. The floor streams the same seven arrays: x, exp_avg and exp_avg_sq are read and written,
grad is read. All contenders step the same memory again and again, as the ascent does.
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

CASES = [(256, 3, 32, 32), (64, 3, 224, 224)]
if DEVICE == "cuda":
    CASES += [(256, 3, 224, 224)]
B1, B2, EPS = 0.9, 0.999, 1e-8


CPU_NOTES = [
    "The floor takes three kernels, one per array that is written; GB/s counts seven arrays. In"
    " cache, three calls can cost more than one fused pass.",
    "`Inductor` compiles a step that does less than the op, and streams at the floor: no kernel"
    " can be 3x faster on one thread, as that would be faster than the memory. Tried against it,"
    " each within the noise: reciprocal and root by approximation and a Newton step; fewer"
    " operations (bias corrections folded, one-instruction clamps); software prefetch. `Inductor,"
    " whole op` does what ours does.",
]


def eager_step(
    x: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, constants: tuple[Tensor, ...]
) -> None:
    """Adam on grad - 2 beta x, then clamp, with precomputed bias corrections."""
    low, high, lr, beta, unbias1, unbias2 = constants
    g = grad - 2 * beta * x
    exp_avg.mul_(B1).add_(g, alpha=1 - B1)
    exp_avg_sq.mul_(B2).addcmul_(g, g, value=1 - B2)
    root = (exp_avg_sq * unbias2).sqrt_().add_(EPS)
    x.add_((exp_avg * unbias1).div_(root).mul_(lr)).clamp_(low, high)


class Case:
    """States (x, grad, exp_avg, exp_avg_sq) of one shape, which all contenders step in turn."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size(shape)
        self.big = self.shape.numel() * 16 > 2**27
        self.count = 2 if self.big else 1
        low, high = (torch.full((1, shape[1], 1, 1), v, device=DEVICE) for v in (-2.0, 2.0))
        lr, beta = torch.tensor(0.01, device=DEVICE), torch.tensor(1e-3, device=DEVICE)
        self.constants = low, high, lr, beta
        self.unbias = tuple(torch.tensor(1 / (1 - b**6), device=DEVICE) for b in (B1, B2))
        self.active = torch.ones(shape[0], dtype=torch.bool, device=DEVICE)
        self.step = torch.full((shape[0],), 5, dtype=torch.int32, device=DEVICE)
        self.states = self.new_states()
        self.following = rotate(self.count)

    def new_states(self) -> list[list[Tensor]]:
        torch.manual_seed(0)
        return [
            [torch.randn(self.shape, device=DEVICE) for _ in range(3)]
            + [torch.rand(self.shape, device=DEVICE)]
            for _ in range(self.count)
        ]

    def eager(self, function: Callable[..., None]) -> Callable[[], None]:
        constants = (*self.constants, *self.unbias)
        return lambda: function(*self.states[self.following()], constants)

    def ours(self, backend: str) -> Callable[[], None]:
        rest = self.step, self.active, *self.constants
        return lambda: ops.ascent_step_(*self.states[self.following()], *rest, backend=backend)

    def floor(self) -> None:
        x, grad, exp_avg, exp_avg_sq = self.states[self.following()]
        x.add_(grad, alpha=0.0)
        exp_avg.mul_(1.0)
        exp_avg_sq.mul_(1.0)

    def check(self, run: Callable[[], None]) -> None:
        """Compare one step from new states with float64, on the first eight rows."""
        for old, new in zip(self.states, self.new_states(), strict=True):
            for a, b in zip(old, new, strict=True):
                a.copy_(b)
        self.step.fill_(5)
        run()
        exact = [t[:8].double() for t in self.new_states()[0]]
        reference.ascent_step_(
            *exact, self.step[:8].clone().fill_(5), self.active[:8],
            *(t.double() for t in self.constants),
        )  # fmt: skip
        torch.testing.assert_close(self.states[0][0][:8].double(), exact[0], rtol=1e-5, atol=1e-5)
        self.step.fill_(5)
        while self.following() != self.count - 1:  # the next run starts at the first state again
            pass


@pytest.mark.parametrize("shape", CASES, ids=lambda s: "x".join(map(str, s)))
def test_ascent_step(benchmark: Any, table: Table, shape: tuple[int, ...]) -> None:
    case = Case(shape)
    native = [b for b in ("cpp", "cuda", "triton") if not backends.why_unavailable(b, DEVICE)]
    contenders = [
        Contender("eager", case.eager(eager_step)),
        Contender("Inductor", case.eager(torch.compile(eager_step, dynamic=False))),
        Contender("Inductor, whole op", case.ours("compile")),
        *(Contender(backend, case.ours(backend)) for backend in native),
    ]
    for contender in contenders:
        case.check(contender.run)
    contenders.append(Contender("floor: 7 arrays", case.floor))
    compare(
        table, "x".join(map(str, shape)), contenders, floor="floor: 7 arrays",
        floor_bytes=7 * 4 * case.shape.numel(), rounds=9 if case.big else 41,
    )  # fmt: skip
    if not table.notes and DEVICE == "cpu":
        table.notes = CPU_NOTES
    benchmark.pedantic(case.ours(native[0]), rounds=5, warmup_rounds=1)
