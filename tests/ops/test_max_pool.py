"""`max_pool` on every backend, against `F.max_pool2d`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runners import (
    CPU_RUNNERS,
    NATIVE,
    Runner,
    assert_refused,
    check_schema_and_fake,
    needs_library,
    op_of,
    run_on_isa,
)
from torch import Tensor
from torch.nn import functional as F

from zsu_fast import ops
from zsu_fast.ops.max_pool import max_pool, output_size

DTYPES = [torch.float32, torch.bfloat16]

# shape, kernel, stride, padding, ceil_mode
CASES = [
    ((2, 16, 8, 8), 2, 2, 0, False),
    ((1, 1, 1, 1), 1, 1, 0, False),
    ((3, 6, 28, 28), 2, 2, 0, False),
    ((2, 20, 7, 9), 2, 2, 0, False),  # the last row and column are in no window
    ((2, 20, 7, 9), 2, 2, 0, True),
    ((2, 33, 9, 6), 2, 2, 1, False),  # the first windows begin in the padding
    ((2, 64, 11, 12), 3, 2, 1, False),  # ResNet
    ((2, 17, 13, 12), 3, 2, 0, True),  # SqueezeNet
    ((1, 5, 6, 7), 3, 1, 1, False),
    ((1, 18, 10, 11), 2, 3, 0, False),  # pixels between windows
    ((1, 18, 10, 11), 2, 3, 1, True),
    ((1, 3, 40, 35), 15, 4, 7, False),
    ((2, 4, 5, 5), 5, 5, 0, False),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Maps with many equal values."""
    return (torch.randn(shape) * 4).round().div(4).to(dtype)


def check(runner: Runner, case: tuple[Any, ...], dtype: torch.dtype, relu: bool) -> None:
    shape, kernel, stride, padding, ceil_mode = case
    x = draw(shape, dtype).requires_grad_()
    want = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
    want = want.relu() if relu else want
    got = max_pool(
        x, kernel, stride, padding, ceil_mode=ceil_mode, relu=relu, backend=runner.backend
    )
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)
    grad = draw(want.shape, dtype)  # quarters: sums are exact
    (right,) = torch.autograd.grad(want, x, grad)
    (found,) = torch.autograd.grad(got, x, grad)
    assert found.dtype == dtype
    torch.testing.assert_close(found, right, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(
    runner: Runner, case: tuple[Any, ...], dtype: torch.dtype, relu: bool
) -> None:
    check(runner, case, dtype, relu)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_as_many_windows_as_torch(ceil_mode: bool) -> None:
    for size in range(3, 12):
        for kernel in range(1, 4):
            for stride in range(1, 4):
                for padding in range(kernel // 2 + 1):
                    x = torch.zeros(1, 1, size, size)
                    want = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode).shape[2]
                    assert output_size(size, kernel, stride, padding, ceil_mode) == want


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_nan_and_infinities(runner: Runner) -> None:
    x = torch.randn(1, 18, 4, 4)
    x[0, 3, 0, 0], x[0, 3, 1, 1], x[0, 4] = math.nan, math.nan, -math.inf
    x[0, 5, 2, 2] = math.inf
    x.requires_grad_()
    for relu in (False, True):
        want = F.max_pool2d(x, 2)
        want = want.relu() if relu else want
        got = max_pool(x, 2, 2, relu=relu, backend=runner.backend)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        right, found = (torch.autograd.grad(y.sum(), x)[0] for y in (want, got))
        assert torch.equal(found, right)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_any_layout(runner: Runner) -> None:
    x = torch.randn(3, 18, 10, 7)
    want = max_pool(x, 2, 2, backend=runner.backend)
    for layout in (
        x.contiguous(memory_format=torch.channels_last),
        torch.randn(3, 18, 10, 20)[..., 4:11].copy_(x),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(max_pool(layout, 2, 2, backend=runner.backend), want)


@needs_library
def test_the_same_bits_on_any_number_of_threads() -> None:
    x = torch.randn(8, 40, 33, 30, requires_grad=True)

    def both() -> list[Tensor]:
        out = max_pool(x, 3, 2, 1, relu=True, backend="cpp")
        return [out, torch.autograd.grad(out.square().sum(), x)[0]]

    first = both()
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, both(), first))


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_an_empty_batch(runner: Runner) -> None:
    x = torch.randn(0, 16, 6, 6, requires_grad=True)
    out = max_pool(x, 2, 2, backend=runner.backend)
    assert out.shape == (0, 16, 3, 3)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@needs_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
from test_max_pool import *
for case in CASES:
    for dtype in DTYPES:
        for relu in (False, True):
            check(Runner("cpp", "cpu"), case, dtype, relu)
"""
    run_on_isa(isa, code)


# ---- refusals ------------------------------------------------------------------------------------
def good(backward: bool) -> dict[str, Any]:
    x = torch.randn(2, 18, 9, 8).contiguous(memory_format=torch.channels_last)
    out = torch.randn(2, 18, 5, 4).contiguous(memory_format=torch.channels_last)
    windows = {"kernel": 3, "stride": 2, "padding": 1}
    if backward:
        place = torch.zeros_like(out, dtype=torch.uint8)
        return {"grad": out, "place": place, **windows, "height": 9, "width": 8}
    return {"x": x, **windows, "out_height": 5, "out_width": 4, "relu": True}


BAD: list[tuple[bool, str, Callable[[Any], Any], str]] = [
    (False, "x", lambda t: t[0], "x must be"),
    (False, "x", lambda t: t.double(), "x must be float32"),
    (False, "x", lambda t: t.contiguous(), "channels-last"),
    (False, "x", lambda t: t[:, :, :0], "begin beyond"),
    (False, "kernel", lambda _: 0, "kernel must be"),
    (False, "kernel", lambda _: 16, "kernel must be"),
    (False, "stride", lambda _: 0, "stride must be"),
    (False, "padding", lambda _: 2, "padding must be"),
    (False, "padding", lambda _: -1, "padding must be"),
    (False, "out_height", lambda _: 6, "begin beyond"),
    (False, "out_width", lambda _: -1, "begin beyond"),
    (True, "grad", lambda t: t.half(), "grad must be float32"),
    (True, "grad", lambda t: t.contiguous(), "channels-last"),
    (True, "place", lambda t: t.int(), "place must be"),
    (True, "place", lambda t: t[:1], "place must be"),
    (True, "place", lambda t: t.contiguous(), "place must be"),
    (True, "place", lambda t: t.to("meta"), "device"),
    (True, "height", lambda _: 7, "begin beyond"),
    (True, "width", lambda _: 0, "begin beyond"),
    (True, "kernel", lambda _: 0, "kernel must be"),
]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("backward", "name", "change", "message"), BAD)
def test_bad_input_is_refused(
    native: bool, backward: bool, name: str, change: Callable[[Any], Any], message: str
) -> None:
    args = good(backward)
    args[name] = change(args[name])
    op_name = "max_pool_backward" if backward else "max_pool"
    assert_refused(op_name, native, args, message)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("backward", [False, True])
def test_what_good_returns_is_not_refused(native: bool, backward: bool) -> None:
    name = "max_pool_backward" if backward else "max_pool"
    op_of(name, native)(*good(backward).values())


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_there_is_no_kernel_for_gpus(backend: str) -> None:
    with pytest.raises(ops.BackendUnavailable):
        max_pool(torch.randn(1, 4, 4, 4), 2, 2, backend=backend)


@needs_library
@pytest.mark.parametrize("backward", [False, True])
def test_opcheck(backward: bool) -> None:
    name = "max_pool_backward" if backward else "max_pool"
    check_schema_and_fake(name, good(backward))
