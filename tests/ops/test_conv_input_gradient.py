"""`conv_input_gradient` on every backend, against autograd in float64."""

from __future__ import annotations

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
from zsu_fast.ops.conv_input_gradient import conv_input_gradient, packed_weight

# images, inputs, outputs, height, width, kernel, stride, padding
CASES = [
    (2, 3, 96, 31, 30, (7, 7), 2, (0, 0)),  # SqueezeNet
    (1, 3, 64, 40, 33, (7, 7), 2, (3, 3)),  # ResNet
    (2, 3, 16, 12, 9, (3, 3), 1, (1, 1)),
    (2, 4, 32, 25, 24, (3, 3), 2, (0, 0)),
    (3, 1, 6, 28, 28, (5, 5), 1, (2, 2)),
    (1, 2, 37, 19, 23, (5, 3), 3, (1, 2)),
    (1, 3, 5, 11, 12, (2, 2), 4, (0, 0)),  # pixels between windows
    (1, 3, 17, 21, 20, (4, 4), 4, (0, 0)),
    (1, 1, 1, 1, 1, (1, 1), 1, (0, 0)),
]


def check(runner: Runner, case: tuple[Any, ...]) -> None:
    images, inputs, outputs, height, width, kernel, stride, padding = case
    weight = torch.randn(outputs, inputs, *kernel)
    x = torch.randn(images, inputs, height, width, dtype=torch.float64, requires_grad=True)
    out = F.conv2d(x, weight.double(), None, stride, padding)
    grad = torch.randn(out.shape)
    (want,) = torch.autograd.grad(out, x, grad.double())
    got = conv_input_gradient(
        grad, packed_weight(weight), stride, padding, (height, width), backend=runner.backend
    )
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * float(want.abs().max()))


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(runner: Runner, case: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    check(runner, case)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_padding_that_is_larger_at_the_end(runner: Runner) -> None:
    """As of a layer that pads by itself: 224 pixels, 3x3, stride 2."""
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 3)
    x = torch.randn(2, 3, 14, 16, requires_grad=True)
    out = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, None, 2)
    grad = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, x, grad)
    got = conv_input_gradient(
        grad, packed_weight(weight), 2, (0, 0), (14, 16), backend=runner.backend
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_nan_reaches_the_pixels_of_its_window_alone(runner: Runner) -> None:
    grad, weight = torch.zeros(1, 19, 6, 6), packed_weight(torch.randn(19, 3, 3, 3))
    grad[0, 18, 2, 3] = torch.nan
    got = conv_input_gradient(grad, weight, 2, (0, 0), (13, 13), backend=runner.backend)
    inside = torch.zeros(13, 13, dtype=torch.bool)
    inside[4:7, 6:9] = True
    assert torch.equal(got.isnan(), inside.expand(1, 3, 13, 13))


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_any_layout(runner: Runner) -> None:
    grad, weight = torch.randn(2, 18, 7, 6), packed_weight(torch.randn(18, 3, 3, 3))
    want, got = (
        conv_input_gradient(g, weight, 1, (1, 1), (7, 6), backend=runner.backend)
        for g in (grad.contiguous(memory_format=torch.channels_last), grad)
    )
    assert torch.equal(got, want)


@needs_library
def test_the_same_bits_on_any_number_of_threads() -> None:
    grad = torch.randn(4, 40, 33, 30)
    weight = packed_weight(torch.randn(40, 3, 7, 7))
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(conv_input_gradient(grad, weight, 2, (3, 3), (66, 60), backend="cpp"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_an_empty_batch(runner: Runner) -> None:
    grad, weight = torch.randn(0, 8, 5, 5), packed_weight(torch.randn(8, 3, 3, 3))
    got = conv_input_gradient(grad, weight, 1, (0, 0), (7, 7), backend=runner.backend)
    assert got.shape == (0, 3, 7, 7)


@needs_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
from test_conv_input_gradient import *
torch.manual_seed(0)
for case in CASES:
    check(Runner("cpp", "cpu"), case)
"""
    run_on_isa(isa, code)


# ---- refusals ------------------------------------------------------------------------------------
def good() -> dict[str, Any]:
    grad = torch.randn(2, 18, 5, 4).contiguous(memory_format=torch.channels_last)
    weight = packed_weight(torch.randn(18, 3, 3, 3))
    return {
        "grad": grad, "weight": weight, "stride": 2, "top": 1, "left": 1, "height": 9, "width": 8,
    }  # fmt: skip


BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("grad", lambda t: t[0], "grad must be"),
    ("grad", lambda t: t.double(), "grad must be float32"),
    ("grad", lambda t: t.bfloat16(), "grad must be float32"),
    ("grad", lambda t: t.contiguous(), "channels-last"),
    ("grad", lambda t: t[:, :17].contiguous(memory_format=torch.channels_last), "weight must be"),
    ("weight", lambda t: t.double(), "weight must be float32"),
    ("weight", lambda t: t[0], "weight must be"),
    ("weight", lambda t: t.transpose(0, 1), "weight must be"),
    ("weight", lambda t: t[:0], "weight must be"),
    ("weight", lambda t: t.repeat(1, 1, 2, 1), "at most 4 inputs"),
    ("weight", lambda t: t.to("meta"), "device"),
    ("stride", lambda _: 0, "stride must be"),
    ("top", lambda _: 3, "padding must be"),
    ("left", lambda _: -1, "padding must be"),
    ("height", lambda _: 7, "begin beyond"),
    ("width", lambda _: 0, "begin beyond"),
]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_input_is_refused(
    native: bool, name: str, change: Callable[[Any], Any], message: str
) -> None:
    args = good()
    args[name] = change(args[name])
    assert_refused("conv_input_gradient", native, args, message)


@pytest.mark.parametrize("native", NATIVE)
def test_what_good_returns_is_not_refused(native: bool) -> None:
    found: Tensor = op_of("conv_input_gradient", native)(*good().values())
    assert found.shape == (2, 3, 9, 8)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_there_is_no_kernel_for_gpus(backend: str) -> None:
    args = good()
    with pytest.raises(ops.BackendUnavailable):
        conv_input_gradient(args["grad"], args["weight"], 2, (1, 1), (9, 8), backend=backend)


@needs_library
def test_opcheck() -> None:
    check_schema_and_fake("conv_input_gradient", good())
