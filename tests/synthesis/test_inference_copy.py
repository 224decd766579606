"""The copy for the ascent: each speed-up is used where it leaves the function as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import SPEC, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.models import zoo
from zsu_fast.models.wrapper import LogitsModel, working_copy
from zsu_fast.runtime.torch_settings import has_bfloat16
from zsu_fast.synthesis import inference_copy as inference_copy_module
from zsu_fast.synthesis.inference_copy import inference_copy, pool_before_relu

CPU = torch.device("cpu")


def images(count: int = 4, shape: tuple[int, ...] = SPEC.shape) -> Tensor:
    return torch.randn(count, *shape)


def folds(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_batch_norms_are_folded_and_maps_are_channels_last() -> None:
    work = working_copy(zoo.build("resnet20_cifar"), CPU)
    for module in work.modules():  # statistics that folding has to get right
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = images(4, (3, 32, 32))
    made = inference_copy(work, x, "float32")
    assert made.folded
    assert made.channels_last
    assert folds(made.module) == 0
    assert folds(work) == 19
    assert made.layout(x).stride() == (3 * 32 * 32, 1, 32 * 3, 3)
    assert torch.allclose(made(made.layout(x)), work(x), rtol=1e-3, atol=1e-3)


def test_the_model_itself_is_not_changed() -> None:
    work = working_copy(tiny(), CPU)
    before = {n: (t.clone(), t.stride()) for n, t in work.state_dict().items()}
    inference_copy(work, images(), "bfloat16")
    for name, tensor in work.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]
    assert all(p.requires_grad for p in work.parameters())


def test_bfloat16_is_close_and_returns_float32() -> None:
    work = working_copy(tiny(), CPU)
    x = images(64)
    made = inference_copy(work, x, "bfloat16")
    assert made.dtype == torch.bfloat16
    with torch.no_grad():
        got, want = made(made.layout(x)), work(x)
    assert got.dtype == torch.float32
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) < 0.03


def test_a_deep_network_runs_in_bfloat16_too() -> None:
    """Its gradient is off by a third, element by element, and points the same way."""
    work = working_copy(zoo.build("resnet20_cifar"), CPU)
    made = inference_copy(work, images(4, (3, 32, 32)), "bfloat16")
    assert made.dtype == torch.bfloat16


class Coarse(nn.Module):
    """A gradient that bfloat16 cannot carry: the two halves of the logits cancel."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(192, 5), nn.Linear(192, 5)
        with torch.no_grad():
            self.two.weight.copy_(-self.one.weight + gap * torch.randn(5, 192))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return 3 + self.one(x) + self.two(x)


@pytest.mark.parametrize(("gap", "fits"), [(1.0, True), (1e-4, False)])
def test_bfloat16_is_left_out_where_the_gradient_turns(gap: float, fits: bool) -> None:
    made = inference_copy(working_copy(Coarse(gap).eval(), CPU), images(), "bfloat16")
    assert (made.dtype == torch.bfloat16) == fits


class Pooling(nn.Module):
    """Every spelling of relu and max_pool2d, and two pools that must stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv(x)))  # 16
        x = torch.max_pool2d(torch.relu(x - 0.2), 2)  # 8
        x = F.max_pool2d((x - 0.1).relu(), kernel_size=2)  # 4
        used_twice = F.relu(x - 0.3)
        x = F.max_pool2d(used_twice, 2) + used_twice[..., ::2, ::2] + F.max_pool2d(x, 2)  # 2
        return self.fc(x.flatten(1))


def test_pooling_comes_before_relu_with_the_same_bits() -> None:
    work = working_copy(Pooling().eval(), CPU)
    x = images(4, (3, 32, 32))
    moved = pool_before_relu(copy.deepcopy(work))
    assert moved is not None
    order = [n.name for n in moved.graph.nodes]
    kinds = ["pool" if "pool" in n else "relu" for n in order if "relu" in n or "pool" in n]
    assert kinds == ["pool", "relu"] * 3 + ["relu", "pool", "pool"]
    got, want = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    (a,) = torch.autograd.grad(moved(got).square().sum(), got)
    (b,) = torch.autograd.grad(work(want).square().sum(), want)
    assert torch.equal(moved(x), work(x))
    assert torch.equal(a, b)
    assert pool_before_relu(working_copy(zoo.build("resnet20_cifar"), CPU)) is None


def test_auto_is_bfloat16_where_the_hardware_has_it() -> None:
    made = inference_copy(working_copy(tiny(), CPU), images(), "auto")
    assert made.dtype == (torch.bfloat16 if has_bfloat16(CPU) else torch.float32)


class Viewing(nn.Module):
    """Flattens by view, which channels-last maps refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_a_speed_up_that_the_model_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_copy_module, "_FEW_CHANNELS", 0)
    work = LogitsModel(Viewing().eval())
    x = images()
    made = inference_copy(work, x, "float32")
    assert not made.channels_last
    assert torch.equal(made(made.layout(x)), work(x))


class Doubling(torch.autograd.Function):
    """Passes its input on and doubles the gradient: symbolic tracing loses that."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pooling()

    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(self.inner(x))


def test_a_copy_with_another_gradient_is_not_used() -> None:
    work = working_copy(Custom().eval(), CPU)
    x = images(4, (3, 32, 32))
    made = inference_copy(work, x, "float32")
    assert made.channels_last
    assert not isinstance(made.module, torch.fx.GraphModule)
    got, want = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    (a,) = torch.autograd.grad(made(made.layout(got)).sum(), got)
    (b,) = torch.autograd.grad(work(want).sum(), want)
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8)])
def test_layout_keeps_the_values(shape: tuple[int, ...]) -> None:
    name = "lenet5" if shape[0] == 1 else None
    work = working_copy(zoo.build(name) if name else tiny(), CPU)
    x = images(4, shape)
    made = inference_copy(work, x, "float32")
    assert torch.equal(made.layout(x), x)


def test_copies_are_compared_in_exact_float32() -> None:
    """On a GPU, cuDNN's TF32 moves the gradient of a deep network by more than is let pass."""
    settings: Any = torch.backends.cudnn.conv
    before, seen = settings.fp32_precision, []
    work = working_copy(tiny(), CPU)
    work.register_forward_hook(lambda *_: seen.append(settings.fp32_precision))
    inference_copy(work, images())
    assert seen
    assert set(seen) == {"ieee"}
    assert settings.fp32_precision == before
