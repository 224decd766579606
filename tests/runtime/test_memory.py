"""Batch size from memory: measured, and halved if memory runs out nevertheless."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from support import bits, tiny
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ClassImpressions, synthesize
from zsu_fast.models import zoo
from zsu_fast.ops import library
from zsu_fast.runtime import memory
from zsu_fast.synthesis.inference_copy import InferenceCopy

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")
CPU = torch.device("cpu")


def chain(layers: int) -> nn.Module:
    """Each layer saves its output, 4,000 bytes per row, for the backward pass."""
    return nn.Sequential(*[nn.ReLU() for _ in range(layers)])


# --- bytes per row ---------------------------------------------------------------------------


def test_bytes_per_row_count_what_autograd_saves() -> None:
    row = torch.randn(1, 1000)
    one = memory.bytes_per_row(chain(1), row)
    assert memory.bytes_per_row(chain(2), row) - one == 4000
    assert memory.bytes_per_row(chain(9), row) - one == 8 * 4000
    assert 2 * 4000 <= one <= 6 * 4000  # the row and its gradient, the output and its gradient


def test_bytes_are_linear_in_the_rows() -> None:
    model = tiny().requires_grad_(False)
    one, eight = (memory.bytes_per_row(model, torch.randn(n, 3, 8, 8)) for n in (1, 8))
    assert eight == pytest.approx(8 * one, rel=0.05)


def test_bytes_grow_with_the_resolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    small, large = (memory.bytes_per_row(model, torch.randn(1, 3, n, n)) for n in (16, 64))
    assert large == pytest.approx(16 * small, rel=0.4)


@pytest.mark.parametrize("trained", [False, True])
def test_weights_are_not_counted_for_each_row(trained: bool) -> None:
    model = nn.Sequential(nn.Linear(100, 2000), nn.ReLU(), nn.Linear(2000, 10))
    model.requires_grad_(trained)  # as in a tail
    assert memory.bytes_per_row(model, torch.randn(1, 100)) < 50_000  # the weights: 880,000


def test_the_row_is_unchanged() -> None:
    row = torch.randn(1, 1000)
    before = row.clone()
    memory.bytes_per_row(chain(3), row)
    assert torch.equal(row, before)
    assert row.grad is None
    assert not row.requires_grad


# --- rows that fit ---------------------------------------------------------------------------


def test_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4_000_000)
    assert memory.rows_that_fit(1000, CPU) == 1000  # in a quarter
    assert memory.rows_that_fit(10**12, CPU) == 1
    assert memory.rows_that_fit(0, CPU) == 1_000_000


def test_free_bytes_are_the_smaller_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.free_bytes(CPU) > 1024**2
    for machine, group, want in ((7, 5, 5), (7, None, 7), (None, 5, 5), (7, 9, 7)):
        monkeypatch.setattr(memory, "proc_bytes", lambda *_, n=machine: n)
        monkeypatch.setattr(memory, "_left_in_group", lambda n=group: n)
        assert memory.free_bytes(CPU) == want
    monkeypatch.setattr(memory, "proc_bytes", lambda *_: None)
    monkeypatch.setattr(memory, "_left_in_group", lambda: None)
    assert memory.free_bytes(CPU) == memory._UNKNOWN


def test_little_memory_means_a_small_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = watch(monkeypatch)
    monkeypatch.setattr(memory, "rows_that_fit", lambda *_: 7)
    impressions = make()
    assert max(widths) == 7
    assert len(impressions) == 40
    assert impressions.hit.all()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        # within an op: torch 2.14 passes the reason on, torch 2.11 does not
        (RuntimeError("aoti_torch_empty_strided failed: CUDA out of memory. Tried to ..."), True),
        (RuntimeError("aoti_torch_empty_strided failed, most likely out of memory (...)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_which_errors_mean_out_of_memory(error: BaseException, is_one: bool) -> None:
    assert memory.is_out_of_memory(error) == is_one


def test_a_real_failed_allocation_means_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


@pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))
@pytest.mark.parametrize("classes", [1, 2**10])
def test_a_failed_allocation_in_an_op_means_out_of_memory(classes: int) -> None:
    """Of a result, and of the contiguous copy of an argument."""
    rows = 2**42
    logits = torch.zeros(1, 1).expand(rows, classes)
    target, coef = torch.zeros(1, dtype=torch.int64).expand(rows), torch.zeros(1).expand(rows)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.zsu_fast.signed_cross_entropy(logits, target, coef)
    assert memory.is_out_of_memory(caught.value)


# --- when memory runs out --------------------------------------------------------------------


def make(**options: Any) -> ClassImpressions:
    return synthesize(tiny(), per_class=8, progress=False, **options)


def watch(monkeypatch: pytest.MonkeyPatch, most: int = 10**6, error: Any = None) -> list[int]:
    """Records the batch size of every forward pass; those above ``most`` raise ``error``."""
    widths: list[int] = []
    run = InferenceCopy.__call__

    def limited(self: InferenceCopy, images: Tensor) -> Tensor:
        widths.append(len(images))
        if len(images) > most:
            raise error
        return run(self, images)

    monkeypatch.setattr(InferenceCopy, "__call__", limited)
    return widths


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
     RuntimeError("aoti_torch_empty_strided failed, most likely out of memory")],  # an op's
    ids=repr,
)  # fmt: skip
def test_the_batch_is_halved_and_the_impressions_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "rows_that_fit", lambda *_: 10)
        want = make()
    widths = watch(monkeypatch, most=12, error=error)
    with caplog.at_level(logging.WARNING):
        impressions = make()
    assert [w for w in widths if w > 12] == [40, 20]  # tried 40, then 20, then 10
    assert all(bits(getattr(impressions, f)) == bits(getattr(want, f)) for f in FIELDS)
    messages = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert messages == [
        f"out of memory: impressions go on with {n} rows at a time" for n in (20, 10)
    ]


def test_not_even_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run = InferenceCopy.__call__
    calls: list[int] = []

    def full(self: InferenceCopy, images: Tensor) -> Tensor:
        if len(images) <= 2 and not calls:  # the checks of the copy, and the measurement
            return run(self, images)
        calls.append(len(images))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(InferenceCopy, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError):
        make()
    assert calls == [40, 20, 10, 5, 2, 1]


def test_other_errors_pass_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = watch(monkeypatch, most=12, error=RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make()
    assert [w for w in widths if w > 12] == [40]


# --- after a call ----------------------------------------------------------------------------


@pytest.mark.usefixtures("hardly_any_rows")
@pytest.mark.parametrize("depth", ["output", "deep"])
def test_a_call_leaves_no_reference_cycles(depth: str) -> None:
    """They would keep copies of the model alive until the garbage collector runs."""
    model = zoo.build("resnet20_cifar").eval()
    options: dict[str, Any] = {
        "impressions_per_class": 4, "steps": 2, "max_steps": 2, "restarts": 0, "progress": False,
        "depth": depth, "space": "input" if depth == "output" else None,
    }  # fmt: skip
    zsu_fast.unlearn(model, 1, **options)  # torch sets up its global state
    gc.collect()
    gc.disable()
    try:
        before = {id(o) for o in gc.get_objects()}
        zsu_fast.unlearn(model, 1, **options)
        left = [o for o in gc.get_objects() if id(o) not in before and isinstance(o, Tensor)]
    finally:
        gc.enable()
    assert not left


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_empty_rows_have_the_layout_of_others(layout: torch.memory_format) -> None:
    rows = torch.zeros(3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    empty = memory.empty_rows(rows, 7)
    assert (empty.shape, empty.dtype) == ((7, 4, 5, 6), torch.float64)
    assert empty.is_contiguous(memory_format=layout)
    assert memory.empty_rows(torch.zeros(3, 8), 0).shape == (0, 8)
