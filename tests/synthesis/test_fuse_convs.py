"""Sums and activations become part of the convolution before them: the function stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.ops import library
from zsu_fast.synthesis import frozen_conv
from zsu_fast.synthesis.frozen_conv import FrozenConv
from zsu_fast.synthesis.fuse_convs import fuse_convs
from zsu_fast.synthesis.spatial_mean import SpatialMean, is_spatial_mean

Block = Callable[[nn.Conv2d, nn.Conv2d, Tensor], Tensor]


class Net(nn.Module):
    """A layer ahead, and ``block`` of two convolutions, of 1x1 and of 3x3."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.ahead, self.block = nn.Conv2d(3, 16, 1), block
        self.point, self.wide = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.point, self.wide, self.ahead(x).sin())


def in_place(point: nn.Conv2d, _wide: nn.Conv2d, x: Tensor) -> Tensor:
    out = point(x)
    out += x
    return out.relu()


def twice(point: nn.Conv2d, _wide: nn.Conv2d, x: Tensor) -> Tensor:
    out = point(x)
    return (out + x).relu() * out


# a block, and the activations of its two convolutions, None for one that stays outside a sum
SUMS: list[tuple[Block, dict[str, str]]] = [
    (lambda point, _wide, x: F.relu(point(x) + x), {"point": "relu"}),
    (lambda point, _wide, x: torch.add(x, point(x)).exp(), {"point": "none"}),
    (lambda point, wide, x: (point(x) + wide(x)).relu(), {"point": "relu"}),
    (lambda point, wide, x: point(wide(x) + x).relu() + x, {"wide": "none"}),
    (lambda point, _wide, x: F.relu6(point(x) + x), {"point": "none"}),
    (lambda point, _wide, x: point(x) + x.mean((2, 3), keepdim=True), {"point": "none"}),
    (in_place, {"point": "relu"}),
    (twice, {}),
    (lambda point, _wide, x: torch.add(point(x), x, alpha=2), {}),
    (lambda point, _wide, x: point(x) + 1, {}),
    (lambda point, _wide, x: (lambda out: out + out)(point(x)), {}),
    (lambda point, _wide, x: point(point(x) + x), {}),
]


def sums(fused: nn.Module) -> dict[str, str]:
    """The activation of each convolution that adds a second input, by name."""
    assert isinstance(fused, torch.fx.GraphModule)
    names = [n.target for n in fused.graph.nodes if n.op == "call_module" and len(n.args) == 2]
    return {str(name): fused.get_submodule(str(name)).activation.name for name in names}


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    out = model(x)
    weights = torch.linspace(0.5, 1, out.shape[-1])
    return out.detach(), torch.autograd.grad((out * weights).sum(), x)[0]


@pytest.mark.parametrize(("block", "expected"), SUMS)
def test_sums_are_computed_with_the_convolution(block: Block, expected: dict[str, str]) -> None:
    torch.manual_seed(0)
    net = Net(block).requires_grad_(False).eval()
    fused = fuse_convs(net)
    assert fused is not None
    assert sums(fused) == expected
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(outputs(fused, x), outputs(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))
@pytest.mark.parametrize("broadcast", [False, True])
def test_sums_are_computed_by_winograd_too(broadcast: bool) -> None:
    def block(point: nn.Conv2d, wide: nn.Conv2d, x: Tensor) -> Tensor:
        other = x.mean((2, 3), keepdim=True) if broadcast else x
        return (wide((point(x) + x).relu()) + other).relu()

    torch.manual_seed(0)
    net = Net(block).requires_grad_(False).eval()
    fused = fuse_convs(net, winograd=True)
    assert fused is not None
    assert sums(fused) == {"point": "relu", "wide": "relu"}
    assert fused.get_submodule("wide").winograd
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(outputs(fused, x), outputs(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_means_over_all_pixels(size: Any) -> None:
    """As at the end of SqueezeNet, with a convolution and relu ahead."""
    model = nn.Sequential(nn.Conv2d(6, 9, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(size))
    model.requires_grad_(False)
    fused = fuse_convs(model)
    assert fused is not None
    assert any(isinstance(m, SpatialMean) for m in fused.modules())
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(outputs(fused, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    unbatched = torch.randn(6, 5, 7)
    torch.testing.assert_close(SpatialMean()(unbatched), nn.AdaptiveAvgPool2d(size)(unbatched))


@pytest.mark.parametrize(
    "layer", [nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((1, 2)), nn.AvgPool2d(1)]
)
def test_other_means_are_left_as_they_are(layer: nn.Module) -> None:
    assert not is_spatial_mean(layer)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (1, (0, 0)), (3, 1)])
def test_gradients_of_strided_convolutions(
    size: int, groups: int, library: bool, kernel: int, padding: int | tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if groups > 1:
        monkeypatch.setattr(frozen_conv, "library_is_fast", lambda *_: library)
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, kernel, 2, padding, groups=groups).requires_grad_(False)
    x = torch.randn(2, 16, size, size)
    torch.testing.assert_close(outputs(FrozenConv(conv), x), outputs(conv, x), rtol=1e-4, atol=1e-5)
