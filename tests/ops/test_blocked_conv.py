"""`blocked_conv` on every backend, against torch in float64."""

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
from zsu_fast.ops.blocked_conv import blocked_conv, blocked_weight, from_blocks, to_blocks

# images, inputs, outputs, height, width, kernel, padding
CASES = [
    (5, 1, 6, 28, 28, (5, 5), (2, 2)),  # LeNet5
    (16, 6, 16, 14, 14, (5, 5), (0, 0)),
    (17, 16, 6, 10, 10, (5, 5), (4, 4)),  # a gradient of it
    (3, 6, 1, 28, 28, (5, 5), (2, 2)),
    (33, 3, 20, 9, 16, (5, 5), (2, 2)),
    (2, 20, 3, 8, 8, (3, 3), (1, 1)),
    (2, 2, 9, 9, 1, (3, 1), (0, 0)),  # a column
    (4, 7, 5, 3, 2, (3, 3), (2, 2)),  # every window reaches beyond the input
    (1, 5, 13, 11, 17, (4, 6), (1, 3)),
    (2, 3, 2, 1, 1, (1, 1), (0, 0)),
    *[(1, 2, outputs, 4, 23, (2, 3), (1, 1)) for outputs in range(1, 8)],
    *[(1, 2, 4, 3, width, (3, 3), (1, 1)) for width in range(1, 14)],
]


def check(runner: Runner, case: tuple[Any, ...]) -> None:
    images, inputs, outputs, height, width, kernel, padding = case
    weight, bias = torch.randn(outputs, inputs, *kernel), torch.randn(outputs)
    x = torch.randn(images, inputs, height, width)
    for b in (bias, None):
        want = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), 1, padding)
        got = blocked_conv(
            to_blocks(x), blocked_weight(weight), b, padding, (want.shape[2], want.shape[3]),
            backend=runner.backend,
        )  # fmt: skip
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        got = from_blocks(got, images).double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-6 * float(want.abs().max()))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17])
def test_blocks_hold_the_images_and_zeros(count: int) -> None:
    images = torch.randn(count, 3, 4, 5)
    blocks = to_blocks(images)
    assert blocks.shape == (-(-count // 16), 3, 4, 5, 16)
    assert blocks.is_contiguous()
    assert torch.equal(from_blocks(blocks, count), images)
    assert from_blocks(blocks, count).data_ptr() != blocks.data_ptr() or not count
    assert not from_blocks(blocks, 32)[count:].any()


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(runner: Runner, case: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    check(runner, case)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("size", [(9, 8), (7, 6), (4, 10)])
def test_any_size_of_the_output(runner: Runner, size: tuple[int, int]) -> None:
    """Zeros after the last row and column are whatever it leaves."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 3, 3, 3), torch.randn(2, 3, 7, 9)
    want = F.conv2d(F.pad(x, (1, 9, 2, 9)), weight)[:, :, : size[0], : size[1]]
    got = blocked_conv(
        to_blocks(x), blocked_weight(weight), None, (2, 1), size, backend=runner.backend
    )
    torch.testing.assert_close(from_blocks(got, 2), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_nan_stays_in_its_image_and_windows(runner: Runner) -> None:
    x, weight = torch.zeros(18, 2, 9, 9), blocked_weight(torch.randn(3, 2, 3, 3))
    x[17, 1, 4, 5] = torch.nan
    got = blocked_conv(to_blocks(x), weight, None, (1, 1), (9, 9), backend=runner.backend)
    found = from_blocks(got, 18).isnan()
    inside = torch.zeros(9, 9, dtype=torch.bool)
    inside[3:6, 4:7] = True
    assert torch.equal(found[17], inside.expand(3, 9, 9))
    assert not found[:17].any()


@needs_library
def test_the_same_bits_on_any_number_of_threads_and_in_any_batch() -> None:
    x, weight = torch.randn(64, 5, 33, 30), blocked_weight(torch.randn(7, 5, 5, 5))

    def run(images: Tensor) -> Tensor:
        out = blocked_conv(to_blocks(images), weight, None, (2, 2), (33, 30), backend="cpp")
        return from_blocks(out, len(images))

    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(run(x))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(run(x[21:22]), found[0][21:22])


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_an_empty_batch(runner: Runner) -> None:
    weight = blocked_weight(torch.randn(8, 3, 3, 3))
    got = blocked_conv(
        torch.randn(0, 3, 5, 5, 16), weight, None, (0, 0), (3, 3), backend=runner.backend
    )
    assert got.shape == (0, 8, 3, 3, 16)


@needs_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
from test_blocked_conv import *
torch.manual_seed(0)
for case in CASES:
    check(Runner("cpp", "cpu"), case)
"""
    run_on_isa(isa, code)


# ---- refusals ------------------------------------------------------------------------------------
def good() -> dict[str, Any]:
    weight = blocked_weight(torch.randn(6, 3, 5, 4))
    return {
        "x": torch.randn(2, 3, 8, 7, 16), "weight": weight, "bias": torch.randn(6), "top": 2,
        "left": 1, "height": 8, "width": 6,
    }  # fmt: skip


BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("x", lambda t: t[0], "x must be"),
    ("x", lambda t: t[..., :8].contiguous(), "x must be"),
    ("x", lambda t: t.double(), "x must be"),
    ("x", lambda t: t.transpose(2, 3), "x must be"),
    ("x", lambda t: t[:, :2].contiguous(), "weight must be"),
    ("weight", lambda t: t.double(), "weight must be float32"),
    ("weight", lambda t: t[0], "weight must be"),
    ("weight", lambda t: t.transpose(1, 2), "weight must be"),
    ("weight", lambda t: t[..., :0], "weight must be"),
    ("weight", lambda t: t.to("meta"), "device"),
    ("bias", lambda t: t[:5], "bias must be"),
    ("bias", lambda t: t.double(), "bias must be"),
    ("bias", lambda t: t.repeat_interleave(2)[::2], "bias must be"),
    ("bias", lambda t: t.to("meta"), "device"),
    ("top", lambda _: 5, "padding must be"),
    ("left", lambda _: -1, "padding must be"),
    ("height", lambda _: 11, "begin beyond"),
    ("width", lambda _: -1, "begin beyond"),
]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_input_is_refused(
    native: bool, name: str, change: Callable[[Any], Any], message: str
) -> None:
    args = good()
    args[name] = change(args[name])
    assert_refused("blocked_conv", native, args, message)


@pytest.mark.parametrize("native", NATIVE)
def test_what_good_returns_is_not_refused(native: bool) -> None:
    found: Tensor = op_of("blocked_conv", native)(*good().values())
    assert found.shape == (2, 6, 8, 6, 16)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_there_is_no_kernel_for_gpus(backend: str) -> None:
    args = good()
    with pytest.raises(ops.BackendUnavailable):
        blocked_conv(args["x"], args["weight"], None, (2, 1), (8, 6), backend=backend)


@needs_library
def test_opcheck() -> None:
    check_schema_and_fake("blocked_conv", good())
