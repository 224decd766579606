"""Steps of the ascent are computed by the way that is the fastest here, by a clear margin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import SPEC, tiny
from torch import nn
from torch.nn import functional as F

from zsu_fast.models.wrapper import working_copy
from zsu_fast.ops import library
from zsu_fast.runtime.torch_settings import SMALL
from zsu_fast.synthesis import candidates, frozen_conv
from zsu_fast.synthesis.candidates import DEFAULT, Choice, choose, may_choose, remembered
from zsu_fast.synthesis.frozen_conv import FrozenConv
from zsu_fast.synthesis.fuse_convs import fuse_convs
from zsu_fast.synthesis.inference_copy import InferenceCopy
from zsu_fast.synthesis.space import SearchSpace, input_space


class Convs(nn.Module):
    """Each kind of convolution, with each activation; one whose output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6()
        self.depth, self.drop = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Identity()
        self.point, self.shortcut = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1, 2)
        self.twice, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        self.dilated = nn.Conv2d(16, 16, 3, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        x = F.relu(self.depth(self.drop(x)))
        x = torch.relu(self.point(x))
        before = self.twice(x)
        x = self.shortcut(F.relu(before) + before)
        return self.fc(self.dilated(F.pad(x, (2, 2, 2, 2))).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolutions_give_the_same_logits_and_gradient(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 convolutions")
    torch.manual_seed(0)
    model = Convs().requires_grad_(False).eval()
    fused = fuse_convs(model)
    assert fused is not None
    layers = {name: m for name, m in fused.named_modules() if isinstance(m, FrozenConv)}
    activations = {name: layer.activation.name for name, layer in layers.items()}
    assert activations == {
        "first": "hardtanh", "depth": "relu", "point": "relu", "twice": "none", "shortcut": "none",
    }  # fmt: skip
    results = []
    for module in (model, fused if dtype == torch.float32 else fuse_convs(model.to(dtype))):
        assert module is not None
        x = torch.linspace(-2, 2, 3 * 3 * 19 * 18).sin().view(3, 3, 19, 18).to(dtype)
        x.requires_grad_(True)
        out = module(x)
        (gradient,) = torch.autograd.grad((out * torch.arange(5)).sum(), x)
        results.append((out.detach().float(), gradient.float()))
    for got, want in zip(*results, strict=True):
        error = float((got - want).norm() / want.norm())
        assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(7, 2, 0), (7, 2, 3), (3, 3, 1), (1, 2, 0)]
)
@pytest.mark.parametrize("size", [23, 24, 25])
@pytest.mark.parametrize("native", [True, False])
def test_the_gradient_of_an_image_is_gathered_or_computed_by_phases(
    kernel: int, stride: int, padding: int, size: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not library.CPU.loaded:
        pytest.skip(str(library.CPU.reason))
    monkeypatch.setattr(frozen_conv, "_has_float32_kernels", lambda _: native)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, kernel, stride, padding).requires_grad_(False)
    frozen = FrozenConv(conv)
    assert (frozen.packed is not None) == native
    assert (frozen.phases is not None) == (not native)
    results = []
    for layer in (conv, frozen):
        x = torch.linspace(-2, 2, 3 * size * size).view(1, 3, size, size).requires_grad_(True)
        results.append(torch.autograd.grad(layer(x).square().sum(), x)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def space() -> SearchSpace:
    return input_space(working_copy(tiny(), torch.device("cpu")), SPEC, "float32")


def clock(seconds: Callable[[InferenceCopy, int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        candidates._Timing, "__call__", lambda _self, model, rows: seconds(model, rows)
    )


def fused(model: InferenceCopy) -> bool:
    return any(isinstance(m, FrozenConv) for m in model.module.modules())


@pytest.mark.parametrize(("ratio", "variant"), [(0.8, "fused convolutions"), (0.95, DEFAULT)])
def test_another_copy_is_taken_if_it_is_clearly_faster(
    ratio: float, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(lambda model, _rows: 1e-3 * (ratio if fused(model) else 1), monkeypatch)
    assert choose(space(), 8, 16, 64, "float32").variant == variant


def test_another_batch_is_taken_if_it_is_clearly_faster_and_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock(lambda _model, rows: 1e-3 if rows < 16 else 0.5e-3, monkeypatch)
    assert choose(space(), 8, 16, 64, "float32") == Choice(DEFAULT, 16, 0.5)
    assert choose(space(), 8, 15, 64, "float32").rows == 8


def test_a_short_run_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def slow(_model: InferenceCopy, rows: int) -> float:
        seen.append(rows)
        return 1.0

    clock(slow, monkeypatch)
    assert choose(space(), 8, 16, 8, "float32") == Choice(DEFAULT, 8)
    assert seen == [8, 8]


def test_small_models_keep_the_default() -> None:
    assert not may_choose(space(), SMALL)
    assert may_choose(space(), SMALL + 1)


def test_a_resumed_run_computes_as_before(tmp_path: Path) -> None:
    choice = Choice("fused convolutions", 16, 0.5)
    assert remembered(tmp_path, {"a": 1}, lambda: choice) == choice
    assert remembered(tmp_path, {"a": 1}, lambda: Choice(DEFAULT, 8)) == choice
    assert remembered(tmp_path, {"a": 2}, lambda: Choice(DEFAULT, 8)) == Choice(DEFAULT, 8)
    assert remembered(None, {"a": 1}, lambda: Choice(DEFAULT, 8)) == Choice(DEFAULT, 8)
