"""Eager, compiled and graph-captured steps of the tail are the same steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import QUICK, same_bits, tiny
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ops
from zsu_fast.errors import ArgumentError, UnlearningWarning
from zsu_fast.runtime import cuda_graph
from zsu_fast.training import train_step
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.fit_task import FitTask
from zsu_fast.training.losses import MaskedKL
from zsu_fast.training.train_step import (
    CompiledTrainStep,
    EagerTrainStep,
    GraphTrainStep,
    make_train_step,
)

FORGET = torch.tensor([True, False, False, True, False])
RATES = [1e-2 * (1 - k / 24) for k in range(24)]


def case(device: str = "cpu") -> tuple[nn.Module, FeatureSet, Tensor]:
    """A two-layer tail, 200 rows, and 24 batches of 64 of them."""
    tail = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).to(device)
    features = torch.randn(200, 12, device=device)
    with torch.no_grad():
        teacher = tail(features) * 3
    label = teacher.argmax(1)
    rows = FeatureSet((features,), teacher, label, FORGET.to(device)[label])
    index = torch.stack([torch.randperm(200)[:64] for _ in RATES])
    return tail, rows, index


def fit_task(
    tail: nn.Module, rows: FeatureSet, forget: Tensor = FORGET, margin: float = 2.0
) -> FitTask:
    """All parameters of ``tail`` on the masked objective."""
    loss = MaskedKL(forget.to(rows.label.device), margin)
    return FitTask(tail, list(tail.parameters()), rows, rows, loss, loss, torch.Generator())


def run(kind: Any, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Parameters and last loss after three blocks of eight steps."""
    torch.manual_seed(0)
    tail, rows, index = case(device)
    step = kind(fit_task(tail, rows))
    for at in range(0, 24, 8):
        loss = step.run(index[at : at + 8], RATES[at : at + 8])
    return [p.detach().clone() for p in tail.parameters()], loss.clone()


def test_a_step_copies_no_logits_of_the_teacher() -> None:
    tail, rows, index = case()
    task = fit_task(tail, rows)
    seen = []

    class Watched(MaskedKL):
        def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
            seen.append(rows.teacher)
            return super().__call__(logits, rows)

    step = EagerTrainStep(replace(task, objective=Watched(FORGET, 2.0)))
    step.run(index[:2], RATES[:2])
    assert len(seen) == 2
    assert all(teacher is rows.teacher for teacher in seen)


def test_the_steps_are_adam_on_the_objective() -> None:
    torch.manual_seed(0)
    tail, rows, index = case()
    other = copy.deepcopy(tail)
    objective = MaskedKL(FORGET, 2.0)
    step = EagerTrainStep(fit_task(tail, rows))
    step.run(index, RATES)
    optimiser = torch.optim.AdamW(other.parameters(), weight_decay=0.0, foreach=False)
    for batch, rate in zip(index, RATES, strict=True):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        part = rows.select(batch)
        logits = other(*part.features)
        loss = ops.masked_cross_entropy(
            logits + objective.margin * FORGET, part.teacher, FORGET, torch.full((64,), 1 / 64)
        )
        loss.backward()
        optimiser.step()
    for a, b in zip(tail.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_steps_are_those_of_torchs_optimiser(dtype: torch.dtype) -> None:
    """float32 bypasses `torch.optim` and calls its fused kernel; float64 goes through it."""
    torch.manual_seed(0)
    tail, rows, index = case()
    tail.to(dtype)
    rows = FeatureSet(tuple(f.to(dtype) for f in rows.features), rows.teacher.to(dtype), rows.label,
                rows.forgotten)  # fmt: skip
    other = copy.deepcopy(tail)
    scales = [5.0 if p.ndim == 1 else 1.0 for p in tail.parameters()]
    steps = [EagerTrainStep(fit_task(t, rows), scales)
                for t in (tail, other)]  # fmt: skip
    groups = [
        {"params": [p for p in other.parameters() if (p.ndim == 1) == bias], "scale": scale}
        for bias, scale in ((False, 1.0), (True, 5.0))
    ]
    steps[1].optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=dtype == torch.float32)
    for step in steps:
        step.run(index, RATES)
    for a, b in zip(tail.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_another_layout_step_as_they_should() -> None:
    """Those of convolutions on channels-last maps are channels-last, the weights are not."""
    torch.manual_seed(0)
    ends = []
    start, grad = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(start.clone())
        adam = train_step._FusedAdam([parameter], [1.0], (0.9, 0.99))
        for _ in range(3):
            adam.step([grad.contiguous(memory_format=layout)])
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_compiled_equals_eager() -> None:
    eager, loss = run(EagerTrainStep)
    compiled, compiled_loss = run(CompiledTrainStep)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert torch.allclose(loss, compiled_loss, rtol=1e-4)


def test_reset_forgets_the_moments() -> None:
    tail, rows, index = case()
    start = copy.deepcopy(tail.state_dict())
    step = EagerTrainStep(fit_task(tail, rows))
    ends = []
    for _ in range(2):
        tail.load_state_dict(start)
        step.reset()
        step.run(index[:5], RATES[:5])
        ends.append([p.detach().clone() for p in tail.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_graph_without_a_gpu_says_so() -> None:
    tail, rows, _ = case()
    with pytest.raises(ArgumentError, match=r"loop: got 'graph'.*cpu.*loop='auto'"):
        make_train_step("graph", fit_task(tail, rows))
    model = tiny()
    with pytest.raises(ArgumentError, match="loop"):
        zsu_fast.unlearn(model, [1], loop="graph", **QUICK)
    with pytest.raises(ArgumentError, match="loop: got 'fast'"):
        zsu_fast.unlearn(model, [1], loop="fast", **QUICK)
    assert same_bits(model, tiny())


def test_auto_on_a_cpu_is_eager() -> None:
    tail, rows, _ = case()
    step = make_train_step("auto", fit_task(tail, rows))
    assert type(step) is EagerTrainStep


def failing_capture(_block: Any) -> Any:
    """As on a GPU: an error in the block also breaks the capture, which then raises another."""
    try:
        raise RuntimeError("a value is read on the host")
    finally:
        raise RuntimeError("capture is invalid")


def test_a_failed_capture_falls_back_to_eager_steps_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[Any] = []
    monkeypatch.setattr(cuda_graph, "warm_up", lambda steps, _device: steps())
    monkeypatch.setattr(
        cuda_graph, "capture", lambda block: (attempts.append(block), failing_capture(block))
    )
    eager, loss = run(EagerTrainStep)
    with pytest.warns(UnlearningWarning) as caught:
        graph, graph_loss = run(GraphTrainStep)  # the warm-up is undone
    for a, b in zip(eager, graph, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert torch.allclose(loss, graph_loss, rtol=1e-4)
    assert len(attempts) == 1
    (warning,) = (str(w.message) for w in caught)
    assert "the training loop runs eagerly" in warning
    assert "a value is read on the host" in warning


def test_a_required_graph_that_cannot_be_captured_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graph, "warm_up", lambda steps, _device: steps())
    monkeypatch.setattr(cuda_graph, "capture", failing_capture)
    tail, rows, index = case()
    start = copy.deepcopy(tail.state_dict())
    step = GraphTrainStep(fit_task(tail, rows), required=True)
    with pytest.raises(
        ArgumentError, match=r"loop: got 'graph', and the capture of .* failed: .*a value.*auto"
    ):
        step.run(index, RATES)
    assert all(torch.equal(value, start[name]) for name, value in tail.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_graph_equals_eager_and_replays_bit_for_bit() -> None:
    eager, loss = run(EagerTrainStep, "cuda")
    graph, graph_loss = run(GraphTrainStep, "cuda")
    again, _ = run(GraphTrainStep, "cuda")
    for a, b, c in zip(eager, graph, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(b, c)
    assert torch.allclose(loss, graph_loss, rtol=1e-4)


@pytest.mark.parametrize("quick", [True, False])
def test_large_tails_multiply_in_bfloat16_within_a_block(
    monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    monkeypatch.setattr(train_step, "has_bfloat16", lambda _device: True)
    monkeypatch.setattr(train_step, "SMALL", 8 * 4 * 3 - 1 if quick else 8 * 4 * 3)
    settings: Any = torch.backends.mkldnn.matmul
    before, precisions = settings.fp32_precision, []
    tail = nn.Linear(4, 3)
    tail.register_forward_hook(lambda *_: precisions.append(settings.fp32_precision))
    forget = torch.tensor([True, False, False])
    features = torch.rand(8, 4)
    rows = FeatureSet(
        (features,), tail(features).detach(), torch.zeros(8).long(), torch.ones(8).bool()
    )
    step = train_step.EagerTrainStep(fit_task(tail, rows, forget, 1.0))
    precisions.clear()
    step.run(torch.arange(8).view(1, 8), [1e-3])
    # once each to compare the gradients, then the step
    assert precisions == ([before, "bf16", "bf16"] if quick else [before])
    assert settings.fp32_precision == before
    precisions.clear()
    step.run(torch.arange(8).view(1, 8), [1e-3])
    assert precisions == (["bf16"] if quick else [before])
    task = replace(fit_task(tail, rows, forget, 1.0), fast_matmul=False)
    step = train_step.EagerTrainStep(task)
    precisions.clear()
    step.run(torch.arange(8).view(1, 8), [1e-3])
    assert precisions == [before]


@pytest.mark.parametrize(("noise", "accepted"), [(0.005, True), (0.1, False)])
def test_products_that_change_the_gradient_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch, noise: float, accepted: bool
) -> None:
    tail, rows, index = case()
    inexact: list[bool] = []

    @contextmanager
    def fast() -> Iterator[None]:
        inexact.append(True)
        yield
        inexact.pop()

    monkeypatch.setattr(train_step, "fast_matmul", lambda _device, _work: fast())
    steps = []

    class Inexact(MaskedKL):
        def gradients(self, *args: Any) -> Any:
            loss, grads = super().gradients(*args)
            steps.append(bool(inexact))
            return loss, [g * (1 + noise) if inexact else g for g in grads]

    task = replace(fit_task(tail, rows), objective=Inexact(FORGET, 2.0))
    EagerTrainStep(task).run(index[:2], RATES[:2])
    assert steps == [False, True, accepted, accepted]


def test_a_gpu_multiplies_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "has_bfloat16", lambda _device: True)
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    fast = train_step.fast_matmul(torch.device("cuda"), train_step.SMALL + 1)
    assert fast is not None
    with fast:
        assert settings.fp32_precision == "tf32"
    assert settings.fp32_precision == before
    assert train_step.fast_matmul(torch.device("cuda"), train_step.SMALL) is None
