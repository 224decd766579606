"""Depthwise convolutions whose input gradient is a convolution again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.depthwise import DepthwiseMode
from zsu_fast.synthesis.inference_copy import inference_copy

SHAPES = [(3, 1, 1, 9, 8), (3, 2, 1, 9, 8), (5, 2, 2, 14, 13), (5, 2, 0, 14, 13), (3, 3, 1, 10, 11)]


@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_same_output_and_input_gradient(
    kernel: int, stride: int, padding: int, height: int, width: int, layout: Any
) -> None:
    x = torch.randn(2, 6, height, width, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_(True)
        out = F.conv2d(given, weight, bias, (stride,) * 2, (padding,) * 2, (1, 1), 6)
        (grad,) = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), given)
        return out, grad

    want = run()
    with DepthwiseMode():
        got = run()
    assert "_Depthwise" in type(got[0].grad_fn).__name__
    assert torch.equal(got[0], want[0])
    assert torch.allclose(got[1], want[1], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3),  # not depthwise
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Conv2d(6, 12, 3, groups=6),  # two outputs a channel
        nn.Conv2d(6, 6, 3, groups=6, dilation=2),
        nn.Conv2d(6, 6, 3, groups=6, padding="same"),
        nn.Conv2d(6, 6, 1, groups=6, padding=1),  # padded by more than the kernel reaches
    ],
)
def test_all_others_are_left_to_the_library(layer: nn.Module) -> None:
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    layer.requires_grad_(False)
    with DepthwiseMode():
        out = layer(x)
    assert "_Depthwise" not in type(out.grad_fn).__name__


def test_weights_that_are_trained_get_their_gradient() -> None:
    layer = nn.Conv2d(6, 6, 3, groups=6)
    with DepthwiseMode():
        layer(torch.randn(2, 6, 9, 9)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.norm() > 0


class NormAndMore(nn.BatchNorm2d):
    """A batch norm that also activates, behind a check that torch.fx can't trace (timm's)."""

    def __init__(self, channels: int, upside_down: bool = False) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()
        self.upside_down = upside_down

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_features or not bool(x.isfinite().all()):
            raise ValueError("channels")
        x = super().forward(x)
        return self.act(-x if self.upside_down else x)


def mobile(upside_down: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), NormAndMore(16),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), NormAndMore(16, upside_down),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean)
    return model.eval()


@pytest.mark.parametrize(("upside_down", "left"), [(False, 0), (True, 1)])
def test_batch_norms_that_do_more_are_folded_if_it_is_seen_what(
    upside_down: bool, left: int
) -> None:
    model = mobile(upside_down)
    x = torch.randn(4, 3, 32, 32)
    made = inference_copy(working_copy(model, torch.device("cpu")), x, "float32")
    assert made.folded
    assert made.depthwise
    assert sum(isinstance(m, nn.BatchNorm2d) for m in made.module.modules()) == left
    assert torch.allclose(made(made.layout(x)), model(x), rtol=1e-4, atol=1e-4)


def test_a_norm_behind_something_else_than_a_convolution_stays() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(
        conv, nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).eval()  # fmt: skip
    made = inference_copy(
        working_copy(model, torch.device("cpu")), torch.randn(4, 3, 8, 8), "float32"
    )
    assert not made.folded
