"""The cheaper copy of a tail: the same outputs and gradients, the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep_case import deep_split
from support import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import InputSpec
from zsu_fast.models.parameters import weights_hash
from zsu_fast.training.deep.fast_tail import FastTail, FoldedConv, PixelMean, fast_tail
from zsu_fast.training.deep.tail import FrozenClassifierTail

SPEC = InputSpec((3, 12, 12), (0.5,) * 3, (0.25,) * 3, "chosen")


class NormAndActivation(nn.BatchNorm2d):
    """As timm's: it normalises and activates."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Net(nn.Module):
    """A tail with everything that is made cheaper: a residual block, a 1x1 convolution, a mean."""

    def __init__(self, groups: int = 1, viewed: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 1)
        self.bn3 = NormAndActivation(16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc, self.viewed = nn.Linear(16, 5), viewed

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = self.bn3(self.conv3(x))
        x = (
            x.view(x.shape[0], -1).view(-1, 16, 36).mean(2)
            if self.viewed
            else self.pool(x).flatten(1)
        )
        return self.fc(x)


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Net(**options).eval()
    for norm in (model.bn2, model.bn3):
        for values in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(values, 1, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def both(model: nn.Module) -> tuple[FrozenClassifierTail, FrozenClassifierTail, Any, list[Any]]:
    """The tail as it is, the faster one, rows for both, and the trained parameters."""
    work, deep = deep_split(model, "conv2", SPEC)
    named = dict(work.module.named_parameters())
    parameters = [named[name] for name in deep.parameters]
    plain, fast = (FrozenClassifierTail(work, deep) for _ in range(2))
    with torch.no_grad():
        rows = deep.split.backbone(torch.randn(20, *SPEC.shape))
    return plain, fast, (rows, fast.speed_up(parameters, rows)), parameters


def assert_same(plain: Any, fast: Any, rows: Any, parameters: list[Any]) -> None:
    outputs = [tail(*r) for tail, r in zip((plain, fast), rows, strict=True)]
    weight = torch.randn_like(outputs[0].logits)
    gradients = []
    for out in outputs:
        total = (weight * out.logits).sum() + out.features.square().sum()
        gradients.append(torch.autograd.grad(total, parameters))
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[1].features, outputs[0].features, rtol=1e-4, atol=1e-4)
    for got, want in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_outputs_and_gradients_stay_and_the_parameters_are_shared() -> None:
    model = net()
    plain, fast, rows, parameters = both(model)
    assert fast.fast is not None
    assert fast.fast.channels_last
    kinds = [type(part) for part in fast.fast.module.modules()]
    assert kinds.count(FoldedConv) == 2
    assert PixelMean in kinds
    assert nn.BatchNorm2d not in [type(part) for part in fast.fast.module.children()]
    assert len(parameters) == 7  # weights of two convolutions, a bias, and both batch norms
    assert_same(plain, fast, rows, parameters)
    with torch.no_grad():  # as a step of the optimiser
        for parameter in parameters:
            parameter.mul_(1.3)
    assert_same(plain, fast, rows, parameters)


def test_the_last_layer_in_it_stays_the_original_one() -> None:
    plain, fast, rows, parameters = both(net())
    with torch.no_grad():
        plain.last.weight.zero_()
    assert_same(plain, fast, rows, parameters)


@pytest.mark.parametrize(
    ("options", "channels_last"), [({"viewed": True}, False), ({"groups": 8}, False), ({}, True)]
)
def test_only_what_the_tail_bears(options: dict[str, Any], channels_last: bool) -> None:
    """x.view() needs the usual layout, and depthwise convolutions are slower in the other one."""
    plain, fast, rows, parameters = both(net(**options))
    assert fast.fast is not None
    assert fast.fast.channels_last == channels_last
    assert_same(plain, fast, rows, parameters)


def test_a_copy_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FoldedConv.forward
    monkeypatch.setattr(FoldedConv, "forward", lambda self, x: 1.01 * right(self, x))
    plain, fast, rows, parameters = both(net())
    assert fast.fast is not None
    assert not [m for m in fast.fast.module.modules() if isinstance(m, FoldedConv)]
    assert_same(plain, fast, rows, parameters)
    monkeypatch.setattr(FastTail, "__call__", lambda *_: (torch.zeros(16, 5), torch.zeros(16, 16)))
    assert fast_tail(fast.tail, fast.last, parameters, rows[0]) is None


def test_a_tail_that_does_not_contain_the_last_layer_has_none() -> None:
    _, deep = deep_split(tiny())
    features = deep.image_features(torch.randn(4, 3, 8, 8))
    assert fast_tail(deep.split.tail, nn.Linear(3, 3), [], features) is None


def test_the_model_is_not_changed() -> None:
    work, deep = deep_split(net(), "conv2", SPEC)
    before, tail = weights_hash(work), FrozenClassifierTail(work, deep)
    code, kinds = deep.split.tail.code, [type(m) for m in work.modules()]
    with torch.no_grad():
        tail.speed_up(
            list(work.module.conv2.parameters()), deep.split.backbone(torch.randn(4, 3, 12, 12))
        )
    assert (deep.split.tail.code, [type(m) for m in work.modules()]) == (code, kinds)
    assert weights_hash(work) == before


class Tokens(nn.Module):
    """A mean over the tokens, by one number, ahead of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mlp(x).mean(1))


class Twice(nn.Module):
    """The last layer under two names, as in a replay of a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens()
        self.again = nn.ModuleList([self.inner.fc])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again[0](self.inner.mlp(x).mean(1))
        return out


@pytest.mark.parametrize("build", [lambda: torch.fx.symbolic_trace(Tokens()), Twice])
def test_a_mean_over_tokens_and_a_last_layer_with_two_names(build: Any) -> None:
    torch.manual_seed(0)
    tail = build().eval()
    last = tail.fc if hasattr(tail, "fc") else tail.again[0]
    parameters = [p for n, p in tail.named_parameters() if "mlp" in n]
    rows = torch.randn(20, 6, 8)
    fast = fast_tail(tail, last, parameters, (rows,))
    assert fast is not None
    logits, features = fast(rows)
    torch.testing.assert_close(logits, tail(rows))
    assert features.shape == (20, 8)
