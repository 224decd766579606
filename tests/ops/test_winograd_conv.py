"""`winograd_conv` on every backend, against `F.conv2d` in float64."""

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
    run_on_isa,
)
from torch import Tensor
from torch.nn import functional as F

from zsu_fast import ops
from zsu_fast.ops import reference
from zsu_fast.ops.winograd_conv import winograd_conv, winograd_weight

# batch, inputs, outputs, height, width, padding
SHAPES = [
    (2, 16, 16, 8, 8, 1),
    (1, 1, 1, 1, 1, 1),  # one pixel
    (1, 1, 1, 3, 3, 0),  # one output
    (3, 5, 7, 1, 1, 2),  # more padding than image
    (1, 3, 40, 6, 6, 0),  # whole tiles
    (2, 17, 33, 7, 5, 1),  # channels and sizes that leave a remainder of everything
    (1, 48, 96, 13, 11, 2),  # two blocks of 48 outputs
    (5, 64, 130, 9, 4, 0),  # the last block is not full
    (1, 24, 8, 2, 19, 1),
    (2, 100, 64, 30, 27, 1),  # more tiles than are computed at once
    (1, 512, 16, 7, 7, 1),
]


def case(
    batch: int, inputs: int, outputs: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, weight and bias."""
    x = torch.randn(batch, inputs, height, width)
    weight = torch.randn(outputs, inputs, 3, 3) / math.sqrt(9 * inputs)
    return x, weight, torch.randn(outputs)


def run(
    runner: Runner, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1, **options: Any
) -> Tensor:
    transformed = winograd_weight(weight)
    return winograd_conv(
        x, transformed, bias, len(weight), padding, backend=runner.backend, **options
    )


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    return F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), padding=padding
    )


def check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    usual = math.sqrt(want.numel())  # outputs of `case` have a standard deviation of 1.4
    assert float((got - want).norm()) < 4e-6 * max(usual, float(want.norm()))


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(runner: Runner, shape: tuple[int, ...]) -> None:
    *sizes, padding = shape
    x, weight, bias = case(*sizes)
    check(run(runner, x, weight, bias, padding), truth(x, weight, bias, padding))
    check(run(runner, x, weight, None, padding), truth(x, weight, None, padding))


def test_the_reference_in_float64_is_a_convolution() -> None:
    """The transforms are exact: what is lost is lost by rounding."""
    x, weight, bias = (t.double() for t in case(2, 5, 7, 9, 6))
    g = torch.tensor(reference.WINOGRAD_WEIGHTS, dtype=torch.float64)
    positions = torch.einsum("ak,oikl,bl->abio", g, weight, g).reshape(36, 1, 5, 7)
    got = reference.winograd_conv(x, positions, bias, None, 7, 1, -math.inf, math.inf)
    torch.testing.assert_close(got, truth(x, weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.0, 6.0), (-0.5, 0.25)], ids=str)
def test_the_output_is_clamped(runner: Runner, bounds: tuple[float, float]) -> None:
    x, weight, bias = case(2, 20, 20, 9, 10)
    got = run(runner, x, weight, bias, bounds=bounds)
    assert got.min() >= bounds[0]
    assert got.max() <= bounds[1]
    check(got, truth(x, weight, bias).clamp(*bounds))


@pytest.mark.parametrize("runner", CPU_RUNNERS)
@pytest.mark.parametrize("shape", [(2, 17, 33, 7, 5, 1), (1, 48, 96, 13, 11, 2)], ids=str)
def test_what_is_added_is_added_ahead_of_the_bounds(runner: Runner, shape: tuple[int, ...]) -> None:
    *sizes, padding = shape
    x, weight, bias = case(*sizes)
    want = truth(x, weight, bias, padding)
    other = torch.randn(want.shape)
    got = run(runner, x, weight, bias, padding, other=other, bounds=(0.0, math.inf))
    check(got, (want + other).clamp(min=0))
    assert torch.equal(run(runner, x, weight, bias, padding, other=0 * other), run(
        runner, x, weight, bias, padding
    ))  # fmt: skip


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_any_layout_gives_channels_last(runner: Runner) -> None:
    x, weight, bias = case(3, 18, 20, 10, 7)
    want = run(runner, x, weight, bias)
    assert want.is_contiguous(memory_format=torch.channels_last)
    wide = torch.randn(3, 18, 10, 20)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": lambda t: wide.clone()[..., 4:11].copy_(t),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    for layout in layouts.values():
        assert torch.equal(run(runner, layout(x), weight, bias), want)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_nan_reaches_its_outputs_and_no_other_tile(runner: Runner) -> None:
    x, weight, bias = case(2, 16, 16, 16, 16)
    x[1, 3, 5, 5] = math.nan
    got = run(runner, x, weight, bias, bounds=(0.0, 6.0))
    assert got[1, :, 4:7, 4:7].isnan().all()  # a clamp that turns NaN into a bound would hide it
    assert got[0].isfinite().all()
    assert got[1, :, 8:].isfinite().all()


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_neighbours_are_not_written(runner: Runner) -> None:
    """Each image of a batch gives the bits that it gives alone."""
    x, weight, bias = case(7, 19, 21, 5, 9)
    together = run(runner, x, weight, bias)
    alone = torch.cat([run(runner, image[None], weight, bias) for image in x])
    if runner.backend == "cpp":
        assert torch.equal(together, alone)
    else:
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 64, 64, 30, 30), (1, 16, 16, 5, 5)], ids=str)
def test_the_same_bits_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x, weight, bias = case(*shape)
    runner = Runner("cpp", "cpu")
    first = run(runner, x, weight, bias)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        assert torch.equal(run(runner, x, weight, bias), first)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_an_empty_batch(runner: Runner) -> None:
    x, weight, bias = case(1, 16, 16, 6, 6)
    assert run(runner, x[:0], weight, bias).shape == (0, 16, 6, 6)


@needs_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
from test_winograd_conv import *
torch.manual_seed(0)
for *sizes, padding in SHAPES:
    x, weight, bias = case(*sizes)
    want = truth(x, weight, bias, padding)
    check(run(Runner("cpp", "cpu"), x, weight, bias, padding), want)
    other = torch.randn(want.shape)
    check(run(Runner("cpp", "cpu"), x, weight, bias, padding, other=other), want + other)
"""
    run_on_isa(isa, code)


# ---- refusals ------------------------------------------------------------------------------------
def good() -> dict[str, Any]:
    x, weight, bias = case(2, 16, 40, 6, 6)
    return {
        "x": x.contiguous(memory_format=torch.channels_last), "weight": winograd_weight(weight),
        "bias": bias, "other": torch.randn(2, 6, 6, 40).permute(0, 3, 1, 2), "outputs": 40,
        "padding": 1, "low": 0.0, "high": 1.0,
    }  # fmt: skip


BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("x", lambda t: t[0], "x must be"),
    ("x", lambda t: t.double(), "x must be float32"),
    ("x", lambda t: t.contiguous(), "channels-last"),
    ("x", lambda t: t[:, :15].contiguous(memory_format=torch.channels_last), "inputs of x"),
    ("x", lambda t: t[:, :0].contiguous(memory_format=torch.channels_last), "inputs of x"),
    ("x", lambda t: t[:, :, :0], "3x3 with its padding"),
    ("weight", lambda t: t[:35], "weight must be"),
    ("weight", lambda t: t.double(), "weight must be"),
    ("weight", lambda t: t[:, :, :, ::2], "weight must be"),
    ("weight", lambda t: t.flatten(2), "weight must be"),
    ("weight", lambda t: t[..., :8].contiguous(), "a block of weight"),
    ("weight", lambda t: t[:, :0], "outputs must end"),
    ("weight", lambda t: t.to("meta"), "device"),
    ("bias", lambda t: t[:-1], "bias must be"),
    ("bias", lambda t: t.double(), "bias must be"),
    ("bias", lambda t: t[:, None], "bias must be"),
    ("bias", lambda t: t[:1].expand(40), "bias must be"),
    ("bias", lambda t: t.to("meta"), "device"),
    ("other", lambda t: t[0], "other must be"),
    ("other", lambda t: t[:1], "other must be"),
    ("other", lambda t: t[:, :39].contiguous(memory_format=torch.channels_last), "other must be"),
    ("other", lambda t: t.contiguous(), "other must be"),
    ("other", lambda t: t.double(), "other must be"),
    ("other", lambda t: t.to("meta"), "device"),
    ("outputs", lambda _: 0, "outputs must end"),
    ("outputs", lambda _: 49, "outputs must end"),
    ("outputs", lambda _: -1, "outputs must end"),
    ("padding", lambda _: -1, "padding must be"),
    ("padding", lambda _: 3, "padding must be"),
]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_input_is_refused(
    native: bool, name: str, change: Callable[[Any], Any], message: str
) -> None:
    args = good()
    args[name] = change(args[name])
    assert_refused("winograd_conv", native, args, message)


@pytest.mark.parametrize("runner", CPU_RUNNERS)
def test_what_good_returns_is_not_refused(runner: Runner) -> None:
    args = good()
    bounds = args.pop("low"), args.pop("high")
    assert winograd_conv(**args, bounds=bounds, backend=runner.backend).shape == (2, 40, 6, 6)


@pytest.mark.parametrize(
    "weight", [torch.ones(4, 4, 5, 5), torch.ones(4, 4, 3), torch.ones(4, 4, 3, 3).double()]
)
def test_other_weights_are_refused(weight: Tensor) -> None:
    with pytest.raises(RuntimeError, match="weight must be float32"):
        winograd_weight(weight)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_there_is_no_kernel_for_gpus(backend: str) -> None:
    x, weight, bias = case(1, 16, 16, 4, 4)
    with pytest.raises(ops.BackendUnavailable):
        winograd_conv(x, winograd_weight(weight), bias, 16, 1, backend=backend)


@needs_library
def test_opcheck() -> None:
    check_schema_and_fake("winograd_conv", good())
