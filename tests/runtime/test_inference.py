"""Forward passes without gradients: the layout, max pooling in it, and models that need another."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.ops import library
from zsu_fast.runtime import inference
from zsu_fast.runtime.inference import Inference, channels_last


class Net(nn.Module):
    """A convolution, and ``rest``."""

    def __init__(self, rest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.rest = nn.Conv2d(3, 8, 3), rest
        self.layouts: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.layouts.append(x.stride(1) == 1)
        return self.rest(self.conv(x).relu())


def images(number: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(number, channels, 18, 18, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_strides(channels: int) -> None:
    x = images(channels=channels)
    laid_out = channels_last(x)
    assert laid_out.stride() == (channels * 18 * 18, 1, 18 * channels, channels)
    assert torch.equal(laid_out, x)
    assert channels_last(laid_out) is laid_out


POOLS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.max_pool2d(x, 2),
    lambda x: torch.max_pool2d(x, 3, 2, 1),
    lambda x: F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True),
    nn.MaxPool2d(3, 2, 1),
]


@pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))
@pytest.mark.parametrize("pool", POOLS)
def test_our_pooling_gives_the_same_values(pool: Callable[[Tensor], Tensor]) -> None:
    net = Net(pool)
    run = Inference(net, images(1))
    with torch.no_grad():
        want = net(channels_last(images()))
    with mock.patch.object(inference, "max_pool", wraps=inference.max_pool) as ours:
        got = run(images())
    assert ours.call_count == 1
    assert net.layouts[-1]
    assert torch.equal(got, want)
    assert not got.requires_grad


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, (2, 3)),
        lambda x: F.max_pool2d(x, 2, dilation=2),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
        lambda x: F.max_pool2d(x.contiguous(), 2),
        lambda x: F.max_pool2d(x.double(), 2),
    ],
)
def test_other_pooling_is_left_alone(pool: Callable[[Tensor], Tensor]) -> None:
    net = Net(pool)
    with torch.no_grad():
        want = net(channels_last(images()))
    with mock.patch.object(inference, "max_pool", side_effect=AssertionError):
        assert torch.equal(Inference(net, images(1))(images()), want)


@pytest.mark.parametrize(
    "rest",
    [
        lambda x: x.view(len(x), -1),  # raises
        lambda x: x.as_strided((len(x), 5), (x.stride(0), 1)),  # computes something else
    ],
)
def test_models_that_need_contiguous_maps_get_them(rest: Callable[[Tensor], Tensor]) -> None:
    net = Net(rest)
    run = Inference(net, images(1))
    with torch.no_grad():
        want = net(images())
    assert torch.equal(run(images()), want)
    assert not net.layouts[-1]


def test_infinite_outputs_do_not_hide_a_difference() -> None:
    def masked_and_strided(x: Tensor) -> Tensor:
        rows = x.as_strided((len(x), 5), (x.stride(0), 1)).clone()
        rows[:, 0] = -torch.inf
        return rows

    net = Net(masked_and_strided)
    run = Inference(net, images(1))
    with torch.no_grad():
        want = net(images())
    assert torch.equal(run(images()), want)


def test_inputs_that_are_no_images_stay_as_they_are() -> None:
    layer = nn.Linear(5, 2)
    rows = torch.randn(3, 5)
    assert torch.equal(Inference(layer, rows[:1])(rows), layer(rows))
