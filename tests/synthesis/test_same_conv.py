"""Frozen convolutions that pad as TensorFlow's "same", against timm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.ops import library
from zsu_fast.synthesis import frozen_conv
from zsu_fast.synthesis.frozen_conv import Activation
from zsu_fast.synthesis.fuse_convs import fuse_convs
from zsu_fast.synthesis.same_conv import SameConv, is_same_conv

layers = pytest.importorskip("timm.layers", reason="timm is not installed")


def conv(channels: int, kernel: int, stride: int, depthwise: bool, **others: object) -> nn.Conv2d:
    torch.manual_seed(0)
    groups = channels if depthwise else 1
    layer: nn.Conv2d = layers.Conv2dSame(
        channels, channels if depthwise else 12, kernel, stride, groups=groups, **others
    )
    return layer.requires_grad_(False).eval()


def output_and_gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
    return out.detach().float(), torch.autograd.grad((out * weights).sum(), x)[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "depthwise"),
    [(3, False), (10, False), (16, True)],
    ids=["image", "full", "depthwise"],
)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (4, 3), (1, 2), (2, 3)])
@pytest.mark.parametrize("size", [(12, 12), (13, 12), (11, 14)], ids=str)
def test_the_same_as_timm(
    size: tuple[int, int], kernel: int, stride: int, channels: int, depthwise: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 convolutions")
    layer = conv(channels, kernel, stride, depthwise).to(dtype)
    assert is_same_conv(layer)
    x = torch.randn(2, channels, *size)
    got = output_and_gradient(SameConv(layer, Activation("relu")), x)
    want = output_and_gradient(lambda t: layer(t.to(dtype)).relu(), x)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        error = float((a - b).norm() / b.norm())
        assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("channels", "depthwise"), [(3, False), (16, True)])
def test_gradients_as_in_bfloat16(
    channels: int, depthwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By phases, and of dilated outputs."""
    monkeypatch.setattr(frozen_conv, "_has_float32_kernels", lambda _: False)
    monkeypatch.setattr(frozen_conv, "library_is_fast", lambda *_: False)
    layer, x = conv(channels, 3, 2, depthwise), torch.randn(2, channels, 12, 13)
    for got, want in zip(
        output_and_gradient(SameConv(layer), x), output_and_gradient(layer, x), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_layer_takes_images_of_any_size() -> None:
    layer = conv(10, 3, 2, False)
    same = SameConv(layer)
    for size in (12, 13, 12):
        x = torch.randn(1, 10, size, size)
        torch.testing.assert_close(same(x), layer(x), rtol=1e-4, atol=1e-5)


class Subclass(layers.Conv2dSame):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3),
        conv(4, 3, 1, False, dilation=2),
        layers.Conv2dSame(8, 8, 3, groups=2),
        Subclass(4, 4, 3),
    ],
)
def test_all_others_are_left_as_they_are(layer: nn.Module) -> None:
    assert not is_same_conv(layer)


@pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))
def test_a_model_of_them_is_fused_and_pads_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.deep = conv(3, 3, 2, False), conv(12, 5, 2, True)
            self.last = conv(12, 1, 1, False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.deep(self.stem(x).relu()).relu()
            out: Tensor = self.last(x) + x
            return out

    net = Net().eval()
    fused = fuse_convs(net)
    assert fused is not None
    found = {name: m for name, m in fused.named_modules() if isinstance(m, SameConv)}
    assert {name: m.activation.name for name, m in found.items()} == {
        "stem": "relu", "deep": "relu", "last": "none",
    }  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    want = output_and_gradient(net, x)
    output_and_gradient(fused, x)  # pads the kernels
    monkeypatch.setattr(F, "pad", None)
    for got, right in zip(output_and_gradient(fused, x), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
