"""Frozen convolutions by `winograd_conv`: outputs and gradients, and which are computed so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from support import SPEC
from torch import nn

from zsu_fast.models.wrapper import working_copy
from zsu_fast.ops import library
from zsu_fast.synthesis import candidates, frozen_conv, inference_copy
from zsu_fast.synthesis.candidates import choose
from zsu_fast.synthesis.frozen_conv import Activation, FrozenConv, is_winograd_supported
from zsu_fast.synthesis.fuse_convs import fuse_convs
from zsu_fast.synthesis.inference_copy import InferenceCopy
from zsu_fast.synthesis.space import SearchSpace, input_space

NAME = "winograd convolutions"
ACTIVATIONS = [Activation(), Activation("relu"), Activation("hardtanh", (-0.5, 0.5))]
pytestmark = pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ids(value: object) -> str:
    return value.name if isinstance(value, Activation) else str(value)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=ids)
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_and_gradients_are_those_of_float64(
    padding: int, activation: Activation, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    conv = nn.Conv2d(24, 17, 3, padding=padding)
    frozen = FrozenConv(conv, activation, winograd=True)
    # every call must be by winograd_conv
    monkeypatch.setattr(frozen_conv, "_onednn", None)
    exact = copy.deepcopy(conv).double()
    x = torch.randn(3, 24, 11, 10, requires_grad=True)
    x64 = x.detach().double().requires_grad_(True)
    out, want = frozen(x), exact(x64).clamp(*activation.limits())
    assert float((out - want).detach().norm() / want.detach().norm()) < 4e-6
    incoming = torch.randn_like(out)
    # where rounding decides on which side of a bound an output is, its gradient is left out
    low, high = activation.limits()
    near = ((want - low).abs() < 1e-4) | ((want - high).abs() < 1e-4)
    incoming[near & (want > low) & (want < high)] = 0
    (gradient,) = torch.autograd.grad(out, x, incoming)
    (right,) = torch.autograd.grad(want, x64, incoming.double())
    assert float((gradient - right).norm() / right.norm()) < 4e-6


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, dilation=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, padding=(0, 1)),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(3, 16, 3, padding=1),  # too few channels to be faster
        nn.Conv2d(16, 16, 3, padding=1).double(),
        nn.Conv2d(16, 16, 3, padding=1).bfloat16(),
        nn.Linear(16, 16),
    ],
    ids=str,
)
def test_others_are_left_to_the_library(conv: nn.Module) -> None:
    assert not is_winograd_supported(conv)
    assert fuse_convs(nn.Sequential(conv), winograd=True) is None
    if isinstance(conv, nn.Conv2d) and frozen_conv.is_supported(conv):
        assert not FrozenConv(conv, winograd=True).winograd


@pytest.mark.parametrize("size", [1, 2])
def test_maps_that_use_little_of_a_tile_are_too(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    layer = FrozenConv(conv, winograd=True)
    monkeypatch.setattr(frozen_conv, "winograd_conv", None)
    x = torch.randn(2, 16, size, size, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, conv(x), rtol=1e-4, atol=1e-5)
    torch.autograd.grad(out.sum(), x)


class Deep(nn.Module):
    """Two convolutions of 3x3 with enough channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(SPEC.shape[0], 8, 3, padding=1)
        self.second, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def deep_space(monkeypatch: pytest.MonkeyPatch) -> SearchSpace:
    """Without blocks of images, which are for few channels."""
    monkeypatch.setattr(inference_copy, "_FEW_CHANNELS", 0)
    torch.manual_seed(0)
    return input_space(working_copy(Deep().eval(), torch.device("cpu")), SPEC, "float32")


def uses_winograd(model: InferenceCopy) -> bool:
    return any(isinstance(m, FrozenConv) and m.winograd for m in model.module.modules())


def test_the_variant_is_chosen_if_it_is_faster(
    deep_space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        candidates._Timing,
        "__call__",
        lambda _self, model, _rows: 5e-4 if uses_winograd(model) else 1e-3,
    )
    choice = choose(deep_space, 8, 16, 64, "float32")
    assert choice.variant == NAME
    assert uses_winograd(candidates.apply(choice, deep_space, "float32").fast_model)


def test_a_variant_that_computes_something_else_is_dropped(
    deep_space: SearchSpace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    correct = frozen_conv.winograd_weight
    monkeypatch.setattr(frozen_conv, "winograd_weight", lambda weight: 1.5 * correct(weight))
    with caplog.at_level(logging.INFO):
        assert candidates.variants("float32")[NAME](deep_space) is None
    assert "runs without one speed-up" in caplog.text


def test_stored_choices_keep_their_numbers() -> None:
    """A cache names a variant by its place."""
    assert list(candidates.variants("auto")) == [
        "default", "fused convolutions", "without channels-last", "float32", NAME
    ]  # fmt: skip


def test_without_the_library_it_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "CPU", library.NativeLibrary("_C_cpu", None, "it was not built"))
    assert fuse_convs(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), winograd=True) is None
